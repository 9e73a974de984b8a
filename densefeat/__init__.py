"""Read dense, high-resolution image features from a store written by the densefeat pipeline."""

import importlib
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

__version__ = "0.1.0"

# zarr and pyarrow take half a second to import, torch seconds: imported when the name is first used (PEP 562).
_IMPORTED_ON_USE = {
    "FeatureStore": "densefeat.store",
    "MaskFolder": "densefeat.align",
    "PixelFeatures": "densefeat.torch",
    "StreamingFeatures": "densefeat.torch",
    "TorchFeatures": "densefeat.torch",
}


def __getattr__(name: str) -> Any:
    """Import the module of a class on its first use."""
    if name not in _IMPORTED_ON_USE:
        raise AttributeError(f"module 'densefeat' has no attribute {name!r}")
    value = getattr(importlib.import_module(_IMPORTED_ON_USE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
