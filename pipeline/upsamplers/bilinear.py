"""Bilinear interpolation as an upsampler: the baseline."""

from torch import Tensor

from pipeline.features.backbone import Backbone
from pipeline.upsamplers.images import resize
from pipeline.upsamplers.interface import Facts, LinearUpsampler, check_images
from schemas.upsamplers import NoOptions

__all__ = ["Bilinear"]


class Bilinear(LinearUpsampler):
    """Bilinear interpolation, align_corners=False. It does not look at the image."""

    name = "bilinear"
    facts = Facts(weights="none", channels="any", scale="any", guidance="nothing", pca="exact: in front")

    @classmethod
    def from_options(cls, options: NoOptions, weights: str | None, backbone: Backbone) -> "Bilinear":
        """As `Upsampler.from_options`."""
        return cls()

    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """As `LinearUpsampler.forward`."""
        check_images(low, images, size)
        return resize(low, size)
