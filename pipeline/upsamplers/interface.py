"""What an upsampler is: low-res features of an image -> high-res features, in components of a PCA basis.

PCA moves in front. Upsamplers that are linear in the features and treat every channel alike project C channels to k
first and upsample those: the same result as upsampling C and projecting, at k/C of the cost (`LinearUpsampler.fold`
says with which matrix and offset). Others find their own place for it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kernels.quantization import Codes, Quantization
from kernels.quantize import quantize, to_float16
from pipeline.errors import ImageError

__all__ = [
    "Facts",
    "Folding",
    "LinearUpsampler",
    "Projected",
    "Stored",
    "Upsampler",
    "checked_basis",
    "with_nonfinite",
]


@dataclass(frozen=True)
class Facts:
    """What an upsampler needs and gives, in words for a table.

    Attributes:
        weights: whether it takes a checkpoint (--upsampler-weights).
        channels: of the features it takes.
        scale: how far it upsamples; beyond and below, a bilinear interpolation ends at the output's size.
        guidance: what it looks at.
        pca: how it comes to k components.
    """

    weights: Literal["none", "optional", "required"]
    channels: str
    scale: str
    guidance: str
    pca: str


class Upsampler(nn.Module):
    """An upsampler that a job can name."""

    name: ClassVar[str]
    facts: ClassVar[Facts]

    def identity(self) -> dict[str, object]:
        """Say what the output depends on besides the inputs, for the configuration hash: a JSON-able dictionary."""
        return {"name": self.name}

    def explain(self, device: torch.device) -> str:
        """Say which implementation runs on a device, and why others don't, for the log."""
        return "plain torch"

    @abstractmethod
    def with_basis(self, mean: Tensor, components: Tensor) -> "Projected":
        """Fold a PCA basis in.

        Args:
            mean: [C], floating.
            components: [k, C], floating, orthonormal rows.

        Returns:
            What upsamples to those components, on this upsampler's device.

        Raises:
            ValueError: the shapes do not agree, or C is not what the upsampler's weights are for.
        """


class Stored(NamedTuple):
    """What is stored of a batch.

    Attributes:
        values: int8 codes, or float16 features, of all its images.
        failures: image of the batch -> why its values are of no use; the other images do not depend on it.
    """

    values: Codes
    failures: dict[int, ImageError]


class Projected(nn.Module):
    """An upsampler with a basis: low-res features of C channels -> k components of high-res features."""

    @abstractmethod
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample.

        Args:
            features: [B, C, h, w] float32, as the backbone made them.
            images: [B, 3, H, W] uint8 RGB, of any size, showing what the features show.
            size: height and width of the output.

        Returns:
            [B, k, *size] float: upsampled features, less the mean, times the components; not finite for an image
            that failed (`store` says why).

        Raises:
            ValueError: an argument is not as above.
        """

    def store(self, features: Tensor, images: Tensor, size: tuple[int, int], step: Tensor | None) -> Stored:
        """As `forward`, as it is stored: quantized with steps [k] float32, or as float16; and what failed.

        Here: images whose features are not finite.
        """
        if step is None:
            return with_nonfinite(to_float16(self(features, images, size)), {})
        return with_nonfinite(self.codes(features, images, size, step), {})

    def codes(self, features: Tensor, images: Tensor, size: tuple[int, int], step: Tensor) -> Codes:
        """As `forward`, quantized with steps [k] float32."""
        return quantize(self(features, images, size), Quantization(step, torch.zeros_like(step)))


@dataclass(frozen=True)
class Folding:
    """How PCA moves in front of an upsampler U: ``(Y - mean) @ components.T == U(X @ projection) + offset``.

    Attributes:
        projection: [C, k] float32. X is not centred first: learned kernels do not sum to 1.
        offset: [k] float32, added after upsampling.
    """

    projection: Tensor
    offset: Tensor


class LinearUpsampler(Upsampler):
    """A linear map from low-res to high-res features, guided by the image, the same for every channel."""

    def fold(self, mean: Tensor, components: Tensor) -> Folding:
        """Fold a PCA basis, and what the upsampler does across channels, into one projection before it.

        Args:
            mean: [C], floating.
            components: [k, C], floating, orthonormal rows.

        Returns:
            The folding, computed in float64. Here: of a map that keeps constants, with nothing across channels.

        Raises:
            ValueError: as `Upsampler.with_basis`.
        """
        mean, components = checked_basis(mean, components)
        return Folding(components.T.contiguous().float(), -(components @ mean).float())

    def with_basis(self, mean: Tensor, components: Tensor) -> Projected:
        """As `Upsampler.with_basis`."""
        return _LinearProjected(self, self.fold(mean, components))

    @abstractmethod
    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample channels that were projected with `fold`'s projection (its offset is left to the caller).

        Args:
            low: [B, k, h, w], floating, not empty.
            images: [B, 3, H, W] uint8 RGB, of any size, showing what ``low`` shows.
            size: height and width of the output.

        Returns:
            [B, k, *size], dtype of ``low``.

        Raises:
            ValueError: an argument is not as above.
        """

    def can_quantize(self, low: tuple[int, int], size: tuple[int, int]) -> bool:
        """Whether `forward_codes` can be called for grids of these heights and widths. Here: no."""
        return False

    def forward_codes(self, low: Tensor, images: Tensor, size: tuple[int, int], quantization: Quantization) -> Codes:
        """As `forward`, quantized as it is made: float features are not written.

        Raises:
            NotImplementedError: it cannot (`can_quantize`).
        """
        raise NotImplementedError(f"{self.name} does not quantize")


class _LinearProjected(Projected):
    projection: Tensor
    offset: Tensor

    def __init__(self, upsampler: LinearUpsampler, folding: Folding) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.register_buffer("projection", folding.projection)
        self.register_buffer("offset", folding.offset)

    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """As `Projected.forward`."""
        high: Tensor = self.upsampler(self._projected(features), images, size)
        return high.float() + self.offset[:, None, None]

    def codes(self, features: Tensor, images: Tensor, size: tuple[int, int], step: Tensor) -> Codes:
        """As `Projected.codes`; without a pass over the features for the offset, or none at all."""
        low, quantization = self._projected(features), Quantization(step, self.offset)
        if self.upsampler.can_quantize((low.shape[2], low.shape[3]), size):
            return self.upsampler.forward_codes(low, images, size, quantization)
        return quantize(self.upsampler(low, images, size), quantization)

    def _projected(self, features: Tensor) -> Tensor:
        """On a GPU in float16: as precise as what is stored, and half the bytes. A CPU computes in float32."""
        low = torch.einsum("bchw,ck->bkhw", features, self.projection)
        return low.half() if low.is_cuda else low


def with_nonfinite(values: Codes, failures: dict[int, ImageError]) -> Stored:
    """Values and known failures, together with the images whose values are not finite for a reason nobody knows."""
    nonfinite = values.not_finite.nonzero().flatten().tolist()
    error = ImageError("nonfinite", "its features contain NaN or infinity")
    return Stored(values, {**dict.fromkeys(nonfinite, error), **failures})


def checked_basis(mean: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and components [k, C] in float64, if they fit together."""
    if mean.ndim != 1 or components.ndim != 2 or components.shape[1] != mean.shape[0]:
        raise ValueError(
            f"components: got shape {tuple(components.shape)}, need [k, C] for a mean [C] of {tuple(mean.shape)}"
        )
    return mean.detach().double(), components.detach().double()
