"""Read dense, high-resolution image features from a store written by the densefeat pipeline."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from densefeat.errors import DensefeatError, MissingFeatures, MissingPackage, StorageUnavailable, StoreError

if TYPE_CHECKING:
    from densefeat.align import MaskFolder
    from densefeat.store import FeatureStore
    from densefeat.torch import PixelFeatures, StreamingFeatures, TorchFeatures

__all__ = [
    "DensefeatError",
    "FeatureStore",
    "MaskFolder",
    "MissingFeatures",
    "MissingPackage",
    "PixelFeatures",
    "StorageUnavailable",
    "StoreError",
    "StreamingFeatures",
    "TorchFeatures",
    "__version__",
]

if importlib.util.find_spec("torch") is None:  # what `from densefeat import *` cannot have
    for _name in ("PixelFeatures", "StreamingFeatures", "TorchFeatures"):
        __all__.remove(_name)

__version__ = "0.1.0"

# zarr and pyarrow take half a second to import, torch seconds: imported when the name is first used (PEP 562).
_IMPORTED_ON_USE = {
    "FeatureStore": "densefeat.store",
    "MaskFolder": "densefeat.align",
    "PixelFeatures": "densefeat.torch",
    "StreamingFeatures": "densefeat.torch",
    "TorchFeatures": "densefeat.torch",
}


def imported_on_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package that imports names when they are first used.

    Args:
        package: its name.
        modules: name -> the module that has it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


__getattr__ = imported_on_use(__name__, _IMPORTED_ON_USE)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
