"""PyTorch datasets over a feature store, and what the device does with their batches. Requires the extra ``torch``."""

from typing import TYPE_CHECKING

from densefeat import imported_on_use
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

# The operations of `densefeat.torch.bilateral` need no store.
__getattr__ = imported_on_use(
    __name__,
    {
        "Dequantize": "densefeat.torch.device",
        "LastStep": "densefeat.torch.last_step",
        "PixelFeatures": "densefeat.torch.pixels",
        "Reconstruct": "densefeat.torch.device",
        "StreamingFeatures": "densefeat.torch.streaming",
        "TorchFeatures": "densefeat.torch.features",
        "to_device": "densefeat.torch.device",
    },
)
