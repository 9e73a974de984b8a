"""PyTorch datasets over a feature store, and what the device does with their batches. Requires the extra ``torch``."""

import importlib
from typing import TYPE_CHECKING, Any

from densefeat.errors import missing_package

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise missing_package("densefeat.torch", "PyTorch", "torch") from error

if TYPE_CHECKING:
    from densefeat.torch.device import Dequantize, Reconstruct, to_device
    from densefeat.torch.features import TorchFeatures
    from densefeat.torch.last_step import LastStep
    from densefeat.torch.pixels import PixelFeatures
    from densefeat.torch.streaming import StreamingFeatures

__all__ = [
    "Dequantize",
    "LastStep",
    "PixelFeatures",
    "Reconstruct",
    "StreamingFeatures",
    "TorchFeatures",
    "to_device",
]

# Imported when first used (PEP 562): the operations of `densefeat.torch.bilateral` need no store.
_IMPORTED_ON_USE = {
    "Dequantize": "device",
    "LastStep": "last_step",
    "PixelFeatures": "pixels",
    "Reconstruct": "device",
    "StreamingFeatures": "streaming",
    "TorchFeatures": "features",
    "to_device": "device",
}


def __getattr__(name: str) -> Any:
    """Import the module of a class on its first use."""
    if name not in _IMPORTED_ON_USE:
        raise AttributeError(f"module 'densefeat.torch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"densefeat.torch.{_IMPORTED_ON_USE[name]}"), name)
    globals()[name] = value
    return value
