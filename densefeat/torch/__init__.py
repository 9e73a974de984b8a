"""PyTorch datasets over a feature store, and what the device does with their batches. Requires the extra ``torch``."""

from densefeat.errors import missing_package

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise missing_package("densefeat.torch", "PyTorch", "torch") from error

from densefeat.torch.device import Dequantize, Reconstruct, to_device
from densefeat.torch.features import TorchFeatures
from densefeat.torch.pixels import PixelFeatures
from densefeat.torch.streaming import StreamingFeatures

__all__ = ["Dequantize", "PixelFeatures", "Reconstruct", "StreamingFeatures", "TorchFeatures", "to_device"]
