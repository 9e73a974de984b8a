"""The page: look at a store in the browser. Needs the extra ``page``; imports nothing but ``densefeat``."""

from densefeat.page.server import create_app, serve

__all__ = ["create_app", "serve"]
