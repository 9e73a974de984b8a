"""The authentication token of a Ray cluster that is started on this machine."""

import os
import secrets
from pathlib import Path

__all__ = ["ensure_token"]

_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def ensure_token() -> None:
    """Set ``RAY_AUTH_TOKEN`` if Ray cannot write a token to ``~/.ray/auth_token``; it does not start without a token.

    Nothing is set if Ray can write one, if there is one already, or if Ray's variables configure authentication.
    """
    folder = Path(os.path.expanduser("~")) / ".ray"  # noqa: PTH111 - Path.expanduser fails without a home
    writable = os.access(folder if folder.is_dir() else folder.parent, os.W_OK | os.X_OK)
    configured = (folder / "auth_token").exists() or any(os.environ.get(name) for name in _AUTH_VARIABLES)
    if not writable and not configured:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
