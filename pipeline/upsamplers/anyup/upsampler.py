"""AnyUp as an upsampler of the job: `pipeline.upsamplers.anyup.network`, which averages projected features."""

import torch
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.checkpoints import read_state_dict, state_digest
from pipeline.upsamplers.anyup.network import AnyUp
from pipeline.upsamplers.images import check_images, imagenet_normalised
from pipeline.upsamplers.interface import Facts, Projected, Upsampler, checked_basis

__all__ = ["AnyUpUpsampler"]


class AnyUpUpsampler(Upsampler):
    """AnyUp (ICLR 2026, arXiv 2510.12764): straight to any size, one set of weights for every backbone.

    Args:
        anyup: the network, in evaluation mode.
    """

    name = "anyup"
    facts = Facts(
        weights="required",
        channels="any",
        scale="any",
        guidance="the image at its own size",
        pca="exact: keys from C channels, values of k",
    )

    def __init__(self, anyup: AnyUp) -> None:
        super().__init__()
        self.anyup = anyup.requires_grad_(False)

    @classmethod
    def from_weights(cls, uri: str) -> "AnyUpUpsampler":
        """Load published weights, every one of them.

        Raises:
            JobError: unreadable, or not AnyUp's.
        """
        try:
            return cls(AnyUp.from_state(read_state_dict(uri)))
        except JobError as error:
            raise JobError(f"{uri}: {error}") from error

    def identity(self) -> dict[str, object]:
        """As `Upsampler.identity`."""
        return {"name": self.name, "weights": state_digest(self.anyup.state_dict())}

    def with_basis(self, mean: Tensor, components: Tensor) -> Projected:
        """As `Upsampler.with_basis`."""
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

    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """As `Projected.forward`. Weights sum to 1, so the values may be centred first."""
        check_images(features, images, size)
        values = torch.einsum("bchw,kc->bkhw", features, self.components) - self.projected_mean[:, None, None]
        high: Tensor = self.anyup(features, values, imagenet_normalised(images), size)
        return high
