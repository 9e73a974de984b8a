"""Private parts of numba that kernels use, one function or class each."""

import hashlib
from collections.abc import Callable
from typing import Any

from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target

__all__ = [
    "KeptOnDisk",
    "copy_elements",
    "declared",
    "element_address",
    "is_compiled",
    "keep_on_disk",
    "nothing",
    "on_stack",
    "processor_features",
]


def processor_features() -> str:
    """Features of the processor that numba compiles for, in LLVM's notation: ``+avx,+avx2,-avx512f,…``.

    Replaces ``numba -s``, which prints them; ``NUMBA_CPU_FEATURES`` sets them.
    """
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return features


# --- Compiled functions on disk ---


def is_compiled(function: Any) -> bool:
    """Whether `numba.njit` returned a dispatcher, and not the function itself (``NUMBA_DISABLE_JIT``)."""
    return isinstance(function, Dispatcher)


def keep_on_disk(dispatcher: Any, cache: "KeptOnDisk") -> None:
    """Set a dispatcher's cache; replaces ``njit(cache=True)``, which uses numba's own cache."""
    dispatcher._cache = cache


class KeptOnDisk(FunctionCache):  # type: ignore[misc, unused-ignore]  # some versions of numba have no types
    """The cache of ``njit(cache=True)``, but its failures do not fail the call, and it depends on other source files.

    Args:
        function: function whose compiled code is cached.
        sources: digest of all sources of the compiled code. Numba checks only the function's own file, but inlined
            functions are in others.
        failed: called with the folder and the error when code cannot be read or written.

    Raises:
        RuntimeError: no folder is writable.
        OSError: the folder has just ceased to be writable.
    """

    def __init__(self, function: Callable[..., Any], sources: str, failed: Callable[[str, Exception], None]) -> None:
        super().__init__(function)
        self._sources, self._failed = sources, failed
        self._cache_file = _NamedAfterContent(
            self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp()
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Cached code for a signature; None if there is none, or if it cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file may raise any exception
            try:
                self.flush()  # so that newly compiled code replaces it
            except OSError:
                self._failed(self.cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Cache compiled code, if it can be written."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # a full disk, or a damaged index, which may raise any exception
            self._failed(self.cache_path, error)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), self._sources


class _NamedAfterContent(IndexDataCacheFile):  # type: ignore[misc, unused-ignore]
    """Numba's cache files, but named by a hash of their key.

    Numba numbers its files. Two processes that save at once then use the same name for different code, and the next
    process to start runs code for another dtype, or, on a shared disk, for another processor.
    """

    def save(self, key: Any, data: Any) -> None:
        """Save compiled code."""
        name = self._data_name_pattern.replace("{number:d}", hashlib.sha256(repr(key).encode()).hexdigest()[:32])
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


# --- Emitting LLVM code, in functions decorated with `numba.extending.intrinsic` ---


def declared(builder: Any, function_type: Any, name: str) -> Any:
    """A function of LLVM or libm, declared once per module; replaces llvmlite's `ir.Function`."""
    return cgutils.get_or_insert_function(builder.module, function_type, name)


def element_address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of an array element; replaces ``array.ctypes.data`` and strides."""
    structure = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, structure, cgutils.unpack_tuple(builder, index))


def on_stack(builder: Any, value: Any) -> Any:
    """Address of a copy of a value on the stack; replaces llvmlite's `alloca` in a function's first block."""
    return cgutils.alloca_once_value(builder, value)


def copy_elements(builder: Any, to: Any, of: Any, count: Any, bytes_each: int) -> None:
    """Copy elements that do not overlap; replaces LLVM's ``memcpy``."""
    cgutils.raw_memcpy(builder, to, builder.bitcast(of, to.type), count, bytes_each)


def nothing(context: Any) -> Any:
    """The return value of a function of type `numba.types.void`."""
    return context.get_dummy_value()
