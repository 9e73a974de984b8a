"""Python imports this in every process of the cluster: images with a marker after their end crash the decoder.

A real crash, as of a bug in a library: the process reads at address 0 and gets SIGSEGV.
"""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_DECODER = "pipeline.images.decoding.decode"
_MARKER = b"\0this image crashes its decoder\0"


class _Poisoned(importlib.abc.MetaPathFinder):
    """Finds the decoder's module where it is, and wraps its function once it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _DECODER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType) -> None:
    decode = module.decode

    def poisoned(data: bytes, *arguments: Any, **options: Any) -> Any:
        if _MARKER in data[-2 * len(_MARKER) :]:
            ctypes.string_at(0)
        return decode(data, *arguments, **options)

    module.decode = poisoned  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Poisoned())
