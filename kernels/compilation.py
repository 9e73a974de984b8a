"""How every function for the CPU is compiled: by numba, and kept on disk where that is possible.

Compiled code is kept in the first of these that can be written: ``NUMBA_CACHE_DIR``, ``__pycache__`` beside the source,
and the user's cache (``$XDG_CACHE_HOME/numba`` or ``~/.cache/numba``). If there is none, each process compiles again.
Left to itself, numba refuses to define a function then, and it fails in the middle of a call if the disk is full, or a
file there is damaged or somebody else's.
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
    """A function compiled at its first call with some dtype, and kept on disk. It runs without Python's lock.

    Args:
        function: what to compile; without it, a decorator is returned.
        options: numba's, such as ``fastmath``.
    """
    if function is None:
        return functools.partial(compiled, **options)
    dispatcher: Any = njit(nogil=True, **options)(function)
    if is_compiled(dispatcher):
        try:
            keep_on_disk(dispatcher, KeptOnDisk(function, _sources(_package(_folder(function))), _say_that_it_failed))
        except (RuntimeError, OSError):  # no folder that can be written, or one that could a moment ago
            _say_that_nothing_is_kept(f"neither {_folder(function)} nor a folder for caches can be written to")
    return dispatcher


def _folder(function: Callable[..., Any]) -> Path:
    return Path(function.__code__.co_filename).parent


def _package(folder: Path) -> Path:
    """The outermost package that a folder is in; the folder itself, if it is no package."""
    while (folder / "__init__.py").exists() and (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder


@functools.cache
def _sources(package: Path) -> str:
    """Digest of a whole package: compiled functions may be made of any file of it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(package.rglob("*.py")))).hexdigest()


def _say_that_it_failed(folder: str, error: Exception) -> None:
    _say_that_nothing_is_kept(f"{folder} cannot be used ({type(error).__name__}: {error})")


_said = False


def _say_that_nothing_is_kept(reason: str) -> None:
    global _said
    if not _said:
        logger.warning("%s: each process compiles again. Set NUMBA_CACHE_DIR to a folder that can be written", reason)
    _said = True
