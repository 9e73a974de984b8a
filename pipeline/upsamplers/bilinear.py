"""Bilinear interpolation as an upsampler: the baseline."""

from torch import Tensor
from typing_extensions import override

from densefeat.torch.bilateral import resize
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.checks import check_images
from pipeline.upsamplers.interface import Facts, LinearUpsampler
from schemas.upsamplers import NoOptions

__all__ = ["Bilinear"]


class Bilinear(LinearUpsampler):
    """Bilinear interpolation, align_corners=False. It ignores the image."""

    name = "bilinear"
    facts = Facts(weights="none", channels="any", scale="any", guidance="nothing", pca="exact: applied first")

    @classmethod
    @override
    def from_options(cls, options: NoOptions, weights: str | None, backbone: Backbone) -> "Bilinear":
        return cls()

    @override
    def last_step(self) -> dict[str, object]:
        return {"name": self.name}

    @override
    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        check_images(low, images, size)
        return resize(low, size)
