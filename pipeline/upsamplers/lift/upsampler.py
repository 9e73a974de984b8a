"""LiFT as an upsampler: `pipeline.upsamplers.lift.network` with a PCA basis in its last convolution."""

import torch
from torch import Tensor
from typing_extensions import override

from densefeat.torch.bilateral import resize
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_state_dict, state_digest
from pipeline.features.provenance import check_pairing
from pipeline.upsamplers.checks import check_images
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.interface import Facts, Projected, Upsampler
from pipeline.upsamplers.lift.network import LiFT
from schemas.upsamplers import LiFTOptions

__all__ = ["LiFTUpsampler"]


class LiFTUpsampler(Upsampler):
    """LiFT (ECCV 2024, arXiv 2403.14625): ×2 per application, then bilinear interpolation to the output's size.

    Args:
        lift: the network, in evaluation mode.
    """

    name = "lift"
    facts = Facts(
        weights="required",
        channels="those of its weights",
        scale="×2 per iteration (--lift-iterations)",
        guidance="the image at the patch size its weights were trained for",
        pca="exact: in its last 1×1 convolution, but C channels are computed up to there",
    )

    def __init__(self, lift: LiFT) -> None:
        super().__init__()
        self.lift = lift.requires_grad_(False)

    @classmethod
    @override
    def from_options(cls, options: LiFTOptions, weights: str | None, backbone: Backbone) -> "LiFTUpsampler":
        assert weights is not None
        check_pairing(weights, cls.name, backbone)
        iterations = options.lift_iterations
        return cls.from_weights(weights, backbone.num_chs, patch=backbone.reduction, iterations=iterations)

    @classmethod
    def from_weights(cls, uri: str, num_chs: int, *, patch: int, iterations: int = 1) -> "LiFTUpsampler":
        """Load published weights, strictly.

        Args:
            uri: checkpoint, local or remote.
            num_chs: channels of the backbone's features.
            patch: pixels per cell of the backbone's features.
            iterations: number of applications.

        Raises:
            JobError: the file is unreadable, does not hold LiFT's weights, or is for another number of channels.
        """
        try:
            return cls(LiFT.from_state(read_state_dict(uri), patch=patch, iterations=iterations, num_chs=num_chs))
        except JobError as error:
            raise JobError(f"{uri}: {error}") from error

    @override
    def identity(self) -> dict[str, object]:
        return {
            "name": self.name,
            "weights": state_digest(self.lift.state_dict()),
            "patch": self.lift.patch,
            "iterations": self.lift.iterations,
        }

    @override
    def with_basis(self, mean: Tensor, components: Tensor) -> Projected:
        return _LiFTProjected(self.lift.folded(mean, components))


class _LiFTProjected(Projected):
    def __init__(self, folded: LiFT) -> None:
        super().__init__()
        self.folded = folded

    @override
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample; in bfloat16 autocast on a GPU, like the backbone."""
        check_images(features, images, size)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=features.is_cuda):
            high = self.folded(features, imagenet_normalised(images))
        return resize(high.float(), size)
