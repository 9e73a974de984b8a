"""PyTorch datasets over a feature store: whole images, and pixels with labels. Requires the extra ``torch``."""

from densefeat.errors import missing_package

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise missing_package("densefeat.torch", "PyTorch", "torch") from error

from densefeat.torch.features import TorchFeatures
from densefeat.torch.pixels import PixelFeatures

__all__ = ["PixelFeatures", "TorchFeatures"]
