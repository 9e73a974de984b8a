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
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

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
    if isinstance(dispatcher, Dispatcher):  # with NUMBA_DISABLE_JIT it is the function itself
        try:
            dispatcher._cache = _Cache(function)  # type: ignore[attr-defined, unused-ignore]
        except (RuntimeError, OSError):  # no folder that can be written, or one that could a moment ago
            _say_that_nothing_is_kept(f"neither {_folder(function)} nor a folder for caches can be written to")
    return dispatcher


class _Cache(FunctionCache):  # type: ignore[misc, unused-ignore]  # some versions of numba have no types
    """Numba's cache, but its failures do not fail the call, and it knows of functions in other files."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._sources = _sources(_folder(function))
        self._cache_file = _Files(self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept for a signature; None if nothing is, or if it cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file fails in any way
            try:
                self.flush()  # so that what is compiled now replaces it
            except OSError:
                self._say(error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, if the disk takes it."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # like the other
            self._say(error)

    def _say(self, error: Exception) -> None:
        _say_that_nothing_is_kept(f"{self.cache_path} cannot be used ({type(error).__name__}: {error})")

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # Numba looks at the function's own file only; what is inlined is in others.
        return *super()._index_key(sig, codegen), self._sources


class _Files(IndexDataCacheFile):  # type: ignore[misc, unused-ignore]
    """Numba's files, but named after what is in them.

    Numba counts. Two processes that save at once then give one name to two things, and the next one to start runs code
    for another dtype, or on a shared disk for another processor.
    """

    def save(self, key: Any, data: Any) -> None:
        """Save compiled code."""
        name = self._data_name_pattern.replace("{number:d}", hashlib.sha256(repr(key).encode()).hexdigest()[:32])
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


def _folder(function: Callable[..., Any]) -> Path:
    return Path(function.__code__.co_filename).parent


@functools.cache
def _sources(folder: Path) -> str:
    """Digest of the whole package that a folder is in: compiled functions may be made of any file of it."""
    while (folder / "__init__.py").exists() and (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))).hexdigest()


_said = False


def _say_that_nothing_is_kept(reason: str) -> None:
    global _said
    if not _said:
        logger.warning("%s: each process compiles again. Set NUMBA_CACHE_DIR to a folder that can be written", reason)
    _said = True
