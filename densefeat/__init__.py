"""Read dense, high-resolution image features from a store written by the densefeat pipeline."""

import importlib
from typing import TYPE_CHECKING, Any

from densefeat._version import __version__
from densefeat.errors import DensefeatError, MissingFeatures, StorageUnavailable, StoreError

if TYPE_CHECKING:
    from densefeat.store import FeatureStore
    from densefeat.torch import TorchFeatures

__all__ = [
    "DensefeatError",
    "FeatureStore",
    "MissingFeatures",
    "StorageUnavailable",
    "StoreError",
    "TorchFeatures",
    "__version__",
]


# zarr and pyarrow take half a second to import, torch seconds: imported when the name is first used (PEP 562).
_IMPORTED_ON_USE = {"FeatureStore": "densefeat.store", "TorchFeatures": "densefeat.torch"}


def __getattr__(name: str) -> Any:
    """Import the module of a class on its first use."""
    if name not in _IMPORTED_ON_USE:
        raise AttributeError(f"module 'densefeat' has no attribute {name!r}")
    value = getattr(importlib.import_module(_IMPORTED_ON_USE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
