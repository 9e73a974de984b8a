"""Read dense, high-resolution image features from a store written by the densefeat pipeline."""

from typing import TYPE_CHECKING, Any

from densefeat._version import __version__
from densefeat.errors import DensefeatError, MissingFeatures, StorageUnavailable, StoreError
from densefeat.store import FeatureStore

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """Import torch only when ``TorchFeatures`` is accessed."""
    if name == "TorchFeatures":
        from densefeat.torch import TorchFeatures

        return TorchFeatures
    raise AttributeError(f"module 'densefeat' has no attribute {name!r}")
