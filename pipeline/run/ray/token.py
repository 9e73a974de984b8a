"""The token with which Ray secures a cluster that it starts in this process."""

import os
import secrets
from pathlib import Path

__all__ = ["ensure_token"]

_ASKED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def ensure_token() -> None:
    """Set ``RAY_AUTH_TOKEN`` where Ray could not write one to ``~/.ray/auth_token``: it does not start without.

    Where it can, or where somebody chose otherwise by one of Ray's variables, nothing is set.
    """
    folder = Path(os.path.expanduser("~")) / ".ray"  # noqa: PTH111 - Path.expanduser fails without a home
    writable = os.access(folder if folder.is_dir() else folder.parent, os.W_OK | os.X_OK)
    if not writable and not (folder / "auth_token").exists() and not any(os.environ.get(name) for name in _ASKED):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
