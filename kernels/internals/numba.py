"""Numba's own parts that kernels use, one function or class each."""

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
    """Features of the processor that numba compiles for, as LLVM writes them: ``+avx,+avx2,-avx512f,…``.

    Stands in for ``numba -s``, which prints them; ``NUMBA_CPU_FEATURES`` sets them.
    """
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return features


# --- Compiled functions on disk ---


def is_compiled(function: Any) -> bool:
    """Whether `numba.njit` returned something that compiles, not the function itself (``NUMBA_DISABLE_JIT``)."""
    return isinstance(function, Dispatcher)


def keep_on_disk(dispatcher: Any, cache: "KeptOnDisk") -> None:
    """Stands in for ``njit(cache=True)``, with another cache than numba's."""
    dispatcher._cache = cache


class KeptOnDisk(FunctionCache):  # type: ignore[misc, unused-ignore]  # some versions of numba have no types
    """What ``njit(cache=True)`` keeps, but a failure does not fail the call, and other files' sources count as well.

    Args:
        function: whose code to keep.
        sources: digest of all that its code is made of. Numba looks at the function's own file only; what is inlined is
            in others.
        failed: called with the folder and an error that keeps code from being read or written.

    Raises:
        RuntimeError: no folder can be written.
        OSError: likewise, but it could be a moment ago.
    """

    def __init__(self, function: Callable[..., Any], sources: str, failed: Callable[[str, Exception], None]) -> None:
        super().__init__(function)
        self._sources, self._failed = sources, failed
        self._cache_file = _NamedAfterContent(
            self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp()
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept for a signature; None if nothing is, or if it cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file fails in any way
            try:
                self.flush()  # so that what is compiled now replaces it
            except OSError:
                self._failed(self.cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, if the disk takes it."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # like the other
            self._failed(self.cache_path, error)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), self._sources


class _NamedAfterContent(IndexDataCacheFile):  # type: ignore[misc, unused-ignore]
    """Numba's files, but named after what is in them.

    Numba counts. Two processes that save at once then give one name to two things, and the next one to start runs code
    for another dtype, or on a shared disk for another processor.
    """

    def save(self, key: Any, data: Any) -> None:
        """Save compiled code."""
        name = self._data_name_pattern.replace("{number:d}", hashlib.sha256(repr(key).encode()).hexdigest()[:32])
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


# --- Writing LLVM's code, in what `numba.extending.intrinsic` decorates ---


def declared(builder: Any, function_type: Any, name: str) -> Any:
    """A function that LLVM or libm has, declared once in a module; stands in for llvmlite's `ir.Function`."""
    return cgutils.get_or_insert_function(builder.module, function_type, name)


def element_address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of an array's element; stands in for ``array.ctypes.data`` and strides."""
    structure = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, structure, cgutils.unpack_tuple(builder, index))


def on_stack(builder: Any, value: Any) -> Any:
    """Address of a copy of a value on the stack; stands in for llvmlite's `alloca` in a function's first block."""
    return cgutils.alloca_once_value(builder, value)


def copy_elements(builder: Any, to: Any, of: Any, count: Any, bytes_each: int) -> None:
    """Copy elements that do not overlap; stands in for LLVM's ``memcpy``."""
    cgutils.raw_memcpy(builder, to, builder.bitcast(of, to.type), count, bytes_each)


def nothing(context: Any) -> Any:
    """What a function of type `numba.types.void` returns."""
    return context.get_dummy_value()
