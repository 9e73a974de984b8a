"""Compile CPU functions with numba, and cache the compiled code on disk where possible.

The cache is the first of these folders that is writable: ``NUMBA_CACHE_DIR``, ``__pycache__`` next to the source, and
the user's cache (``$XDG_CACHE_HOME/numba`` or ``~/.cache/numba``). If there is none, each process compiles again.
Without this module, numba would then refuse to define a function. It would also fail in the middle of a call if the
disk is full, or if a file in the cache is damaged or owned by another user.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from kernels.internals.numba import KeptOnDisk, is_compiled, keep_on_disk

__all__ = ["compiled"]

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function at its first call with each signature, and cache it on disk. It runs without Python's lock.

    Args:
        function: function to compile; without it, a decorator is returned.
        options: options of numba, such as ``fastmath``.
    """
    if function is None:
        return functools.partial(compiled, **options)
    dispatcher: Any = njit(nogil=True, **options)(function)
    if is_compiled(dispatcher):
        try:
            keep_on_disk(dispatcher, KeptOnDisk(function, _sources(_package(_folder(function))), _warn_of_failure))
        except (RuntimeError, OSError):  # no folder is writable, or one has just ceased to be
            _warn_once(f"neither {_folder(function)} nor a folder for caches is writable")
    return dispatcher


def _folder(function: Callable[..., Any]) -> Path:
    return Path(function.__code__.co_filename).parent


def _package(folder: Path) -> Path:
    """The outermost package that contains a folder; the folder itself if it is not in a package."""
    while (folder / "__init__.py").exists() and (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder


@functools.cache
def _sources(package: Path) -> str:
    """Digest of a whole package: compiled functions may include code from any of its files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(package.rglob("*.py")))).hexdigest()


def _warn_of_failure(folder: str, error: Exception) -> None:
    _warn_once(f"{folder} cannot be used ({type(error).__name__}: {error})")


_warned = False


def _warn_once(reason: str) -> None:
    """Warn that compiled code is not cached."""
    global _warned
    if not _warned:
        logger.warning("%s: each process compiles again. Set NUMBA_CACHE_DIR to a writable folder", reason)
    _warned = True
