"""AnyUp as an upsampler: `pipeline.upsamplers.anyup.network` applied to projected features."""

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_state_dict, state_digest
from pipeline.features.provenance import check_pairing
from pipeline.upsamplers.anyup.network import AnyUp
from pipeline.upsamplers.checks import check_images, checked_basis
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.interface import Facts, Projected, Upsampler
from schemas.upsamplers import NoOptions

__all__ = ["AnyUpUpsampler"]


class AnyUpUpsampler(Upsampler):
    """AnyUp (ICLR 2026, arXiv 2510.12764): directly to any size, with one set of weights for every backbone.

    Args:
        anyup: the network, in evaluation mode.
    """

    name = "anyup"
    smallest_grid = 2
    facts = Facts(
        weights="required",
        channels="any",
        scale="any",
        guidance="the image at its own size",
        pca="exact: keys from C channels, values from k",
    )

    def __init__(self, anyup: AnyUp) -> None:
        super().__init__()
        self.anyup = anyup.requires_grad_(False)

    @classmethod
    @override
    def from_options(cls, options: NoOptions, weights: str | None, backbone: Backbone) -> "AnyUpUpsampler":
        assert weights is not None
        check_pairing(weights, cls.name, backbone)
        return cls.from_weights(weights)

    @classmethod
    def from_weights(cls, uri: str) -> "AnyUpUpsampler":
        """Load published weights, strictly.

        Raises:
            JobError: the file is unreadable or does not hold AnyUp's weights.
        """
        try:
            return cls(AnyUp.from_state(read_state_dict(uri)))
        except JobError as error:
            raise JobError(f"{uri}: {error}") from error

    @override
    def identity(self) -> dict[str, object]:
        return {"name": self.name, "weights": state_digest(self.anyup.state_dict())}

    @override
    def with_basis(self, mean: Tensor, components: Tensor) -> Projected:
        mean, components = checked_basis(mean, components)
        return _AnyUpProjected(self.anyup, components.float(), (components @ mean).float())


class _AnyUpProjected(Projected):
    components: Tensor
    projected_mean: Tensor

    def __init__(self, anyup: AnyUp, components: Tensor, projected_mean: Tensor) -> None:
        super().__init__()
        self.anyup = anyup
        self.register_buffer("components", components)
        self.register_buffer("projected_mean", projected_mean)

    @override
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample centred values: attention weights sum to 1, so the mean can be subtracted first."""
        check_images(features, images, size)
        values = torch.einsum("bchw,kc->bkhw", features, self.components) - self.projected_mean[:, None, None]
        high: Tensor = self.anyup(features, values, imagenet_normalised(images), size)
        return high
