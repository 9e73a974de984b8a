"""The interface of upsamplers: low-res features of an image -> high-res features, in components of a PCA basis.

PCA moves in front. Upsamplers that are linear in the features and treat every channel alike project C channels to k
first and upsample those: the same result as upsampling C and projecting, at k/C of the cost (`LinearUpsampler.fold`
says with which matrix and offset). Others find their own place for it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from kernels.quantization import Codes, Encoding, Quantization
from pipeline.errors import ImageError
from pipeline.features.backbone import Backbone

__all__ = [
    "Facts",
    "Folding",
    "LinearUpsampler",
    "Projected",
    "Stored",
    "Upsampler",
    "check_images",
    "checked_basis",
    "with_nonfinite",
]


@dataclass(frozen=True)
class Facts:
    """The needs and properties of an upsampler, in words for a table.

    Attributes:
        weights: whether it takes a checkpoint (--upsampler-weights).
        channels: of the features it takes.
        scale: how far it upsamples; beyond and below, a bilinear interpolation ends at the output's size.
        guidance: its guidance.
        pca: where the PCA projection takes place.
        weights_from: where a person gets weights, if they are required.
    """

    weights: Literal["none", "optional", "required"]
    channels: str
    scale: str
    guidance: str
    pca: str
    weights_from: str = "see README.md for their source"


class Upsampler(nn.Module):
    """An upsampler that a job can name."""

    name: ClassVar[str]
    facts: ClassVar[Facts]
    smallest_grid: int = 1  # height and width of the features that it takes

    @classmethod
    @abstractmethod
    def from_options(cls, options: Any, weights: str | None, backbone: Backbone) -> "Upsampler":
        """Build it on the CPU.

        Args:
            options: its own dataclass in `schemas.upsamplers`, `NoOptions` if it has none.
            weights: URI of a checkpoint, or None; agrees with `facts`.
            backbone: its features are upsampled.

        Raises:
            JobError: the weights cannot be read or do not fit the backbone; the options do not fit.
        """

    def identity(self) -> dict[str, object]:
        """Everything that the output depends on besides the inputs, JSON-able: for the configuration hash."""
        return {"name": self.name}

    def check_grid(self, channels: int, grid: tuple[int, int]) -> None:
        """Refuse features that it cannot upsample, before any are made.

        Args:
            channels: C of the features.
            grid: their height and width.

        Raises:
            ValueError: the grid is smaller than `smallest_grid`, or C is not what the upsampler's weights are for.
        """
        if min(grid) < self.smallest_grid:
            raise ValueError(
                f"features: got {grid[0]}×{grid[1]}, need at least {self.smallest_grid} on both axes: the border is "
                "reflected"
            )
        self.with_basis(torch.zeros(channels), torch.eye(1, channels))

    def explain(self, device: torch.device) -> str:
        """The implementation that runs on a device, and why others do not, for the log."""
        return "plain torch"

    @abstractmethod
    def with_basis(self, mean: Tensor, components: Tensor) -> "Projected":
        """Fold a PCA basis in.

        Args:
            mean: [C], floating.
            components: [k, C], floating, orthonormal rows.

        Returns:
            The upsampler of those components, on this upsampler's device.

        Raises:
            ValueError: the shapes do not agree, or C is not what the upsampler's weights are for.
        """


class Stored(NamedTuple):
    """The stored values of a batch.

    Attributes:
        values: int8 codes, or float16 features, of all its images.
        failures: index of an image in the batch -> why it failed. The other images do not depend on it.
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
            that failed (`encode` says why).

        Raises:
            ValueError: an argument is not as above.
        """

    def encode(self, features: Tensor, images: Tensor, size: tuple[int, int], encoding: Encoding) -> Stored:
        """Upsample as `forward`, and encode for the store.

        Args:
            features: as `forward`.
            images: as `forward`.
            size: as `forward`.
            encoding: of the store, its steps on the device of the features.

        Returns:
            The codes [B, k, *size], and the images that failed. Here: those whose features are not finite.

        Raises:
            ValueError: as `forward`.
        """
        return with_nonfinite(encoding.encode(self(features, images, size)), {})


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

    @override
    def with_basis(self, mean: Tensor, components: Tensor) -> Projected:
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

    def encode(
        self,
        low: Tensor,
        images: Tensor,
        size: tuple[int, int],
        encoding: Encoding,
        offset: Tensor | None = None,
    ) -> Codes:
        """Upsample as `forward`, add an offset [k] float32, and encode: in one kernel if `can_quantize`."""
        quantization = encoding.quantization(offset)
        if quantization is not None and self.can_quantize((low.shape[2], low.shape[3]), size):
            return self.forward_codes(low, images, size, quantization)
        return encoding.encode(self(low, images, size), offset)

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

    @override
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        high: Tensor = self.upsampler(self._projected(features), images, size)
        return high.float() + self.offset[:, None, None]

    @override
    def encode(self, features: Tensor, images: Tensor, size: tuple[int, int], encoding: Encoding) -> Stored:
        """The offset takes no pass over the features of its own."""
        codes = self.upsampler.encode(self._projected(features), images, size, encoding, self.offset)
        return with_nonfinite(codes, {})

    def _projected(self, features: Tensor) -> Tensor:
        """On a GPU in float16: as precise as what is stored, and half the bytes. A CPU computes in float32."""
        low = torch.einsum("bchw,ck->bkhw", features, self.projection)
        return low.half() if low.is_cuda else low


def with_nonfinite(values: Codes, failures: dict[int, ImageError]) -> Stored:
    """Values and known failures, plus a failure for every other image whose values are not finite."""
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


def check_images(features: Tensor, images: Tensor, size: tuple[int, int]) -> None:
    """Features [B, channels, h, w], their images and the output's size, as every upsampler takes them."""
    if features.ndim != 4 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"features: got {tuple(features.shape)} {features.dtype}, need [B, channels, h, w] of a floating dtype, "
            "not empty"
        )
    if images.ndim != 4 or images.shape[:2] != (features.shape[0], 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images: got {tuple(images.shape)} {images.dtype}, need [{features.shape[0]}, 3, H, W] of uint8 RGB"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: got {size}, need height and width of at least 1")
