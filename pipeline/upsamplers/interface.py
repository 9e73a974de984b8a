"""The interface of upsamplers: low-res features of an image -> high-res features, in components of a PCA basis.

Upsamplers that are linear in the features and treat all channels alike apply PCA first: they project C channels to k
and upsample those. The result equals upsampling C channels and then projecting, at k/C of the cost;
`LinearUpsampler.fold` computes the matrix and offset. Other upsamplers apply PCA wherever it suits them.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from kernels.quantization import Codes, Encoding, Quantization
from pipeline.errors import ImageError
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.checks import check_images, check_smallest, checked_basis
from pipeline.upsamplers.fitting import Fitting, UpsamplerFit

__all__ = [
    "Facts",
    "Folding",
    "LinearUpsampler",
    "Projected",
    "Stored",
    "Upsampler",
    "with_nonfinite",
]


@dataclass(frozen=True)
class Facts:
    """Requirements and properties of an upsampler, worded for a table.

    Attributes:
        weights: whether it takes a checkpoint (--upsampler-weights).
        channels: which numbers of channels it accepts.
        scale: factor by which it upsamples; bilinear interpolation covers the rest, to the output's size.
        guidance: what guides it.
        pca: where the PCA projection is applied, and whether it is exact.
        weights_from: how to get weights, if they are required.
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
    smallest_grid: int = 1  # minimum height and width of the features

    @classmethod
    @abstractmethod
    def from_options(cls, options: Any, weights: str | None, backbone: Backbone) -> "Upsampler":
        """Build the upsampler on the CPU.

        Args:
            options: an instance of its dataclass in `schemas.upsamplers`, or `NoOptions`.
            weights: URI of a checkpoint, or None; consistent with `facts`.
            backbone: whose features are upsampled.

        Raises:
            JobError: the weights cannot be read or do not match the backbone, or the options are invalid.
        """

    def identity(self) -> dict[str, object]:
        """Return all that the output depends on besides its inputs, JSON-serialisable, for the configuration hash."""
        return {"name": self.name}

    def check_grid(self, channels: int, grid: tuple[int, int]) -> None:
        """Reject features that it cannot upsample, before any are computed.

        Args:
            channels: C of the features.
            grid: their height and width.

        Raises:
            ValueError: the grid is smaller than `smallest_grid`, or the upsampler's weights are for another C.
        """
        check_smallest(grid, self.smallest_grid)
        self.with_basis(torch.zeros(channels), torch.eye(1, channels))

    def fitting(self) -> Fitting | None:
        """How it is fitted to images of the dataset before it can upsample; None: it needs no fit."""
        return None

    def fitted(self, fit: UpsamplerFit) -> "Upsampler":
        """The upsampler with the result of its `fitting`; it shares its backbone and weights with this one."""
        raise TypeError(f"{self.name} is not fitted to images")

    def last_step(self) -> Mapping[str, Any] | None:
        """The step from `Projected.before_last_step` to the features, as `densefeat.torch.LastStep` reads it.

        None: readers of a store cannot take it, so that no compact store can be made.
        """
        return None

    def grid_before_last_step(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the result of `Projected.before_last_step`, for features on a grid."""
        return grid

    def explain(self, device: torch.device) -> str:
        """Describe, for the log, which implementation runs on a device and why others do not."""
        return "plain torch"

    @abstractmethod
    def with_basis(self, mean: Tensor, components: Tensor) -> "Projected":
        """Fold in a PCA basis.

        Args:
            mean: [C], floating.
            components: [k, C], floating, orthonormal rows.

        Returns:
            An upsampler that outputs those components, on this upsampler's device.

        Raises:
            ValueError: the shapes do not agree, or the upsampler's weights are for another C.
        """


class Stored(NamedTuple):
    """The stored values of a batch.

    Attributes:
        values: int8 codes or float16 features of all images in the batch.
        failures: index of an image in the batch -> why it failed. Other images are unaffected.
    """

    values: Codes
    failures: dict[int, ImageError]


class Projected(nn.Module):
    """An upsampler with a PCA basis: low-res features of C channels -> k components of high-res features."""

    @abstractmethod
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample.

        Args:
            features: [B, C, h, w] float32, as the backbone returns them.
            images: [B, 3, H, W] uint8 RGB, of any size, covering the same area as the features.
            size: height and width of the output.

        Returns:
            [B, k, *size] float: upsampled features, minus the mean, projected on the components; not finite for an
            image that failed (`encode` reports why).

        Raises:
            ValueError: an argument is not as above.
        """

    def encode(self, features: Tensor, images: Tensor, size: tuple[int, int], encoding: Encoding) -> Stored:
        """Upsample as `forward` does, and encode for the store.

        Args:
            features: as `forward`.
            images: as `forward`.
            size: as `forward`.
            encoding: the store's, with its steps on the features' device.

        Returns:
            The codes [B, k, *size] and the images that failed. By default: those whose features are not finite.

        Raises:
            ValueError: as `forward`.
        """
        return with_nonfinite(encoding.encode(self(features, images, size)), {})

    def before_last_step(
        self, features: Tensor, images: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, dict[int, ImageError]]:
        """Upsample as `forward` does, up to the last step: `Upsampler.last_step` of the result is `forward`'s.

        Args:
            features: as `forward`.
            images: as `forward`.
            size: as `forward`.

        Returns:
            [B, k, h', w'] float on the grid of `Upsampler.grid_before_last_step`; and the images that failed.

        Raises:
            NotImplementedError: `Upsampler.last_step` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no last step that readers can take")


@dataclass(frozen=True)
class Folding:
    """How PCA is applied before an upsampler U: ``(Y - mean) @ components.T == U(X @ projection) + offset``.

    Attributes:
        projection: [C, k] float32. X is not centred, because learned kernels do not sum to 1.
        offset: [k] float32, added after upsampling.
    """

    projection: Tensor
    offset: Tensor


class LinearUpsampler(Upsampler):
    """An upsampler that is linear in the features, guided by the image, and identical for every channel."""

    def fold(self, mean: Tensor, components: Tensor) -> Folding:
        """Fold a PCA basis, and any mixing of channels by the upsampler, into one projection applied first.

        Args:
            mean: [C], floating.
            components: [k, C], floating, orthonormal rows.

        Returns:
            The folding, computed in float64. By default: for a map that preserves constants and mixes no channels.

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
        """Upsample channels already projected by `fold`'s projection; the caller adds its offset.

        Args:
            low: [B, k, h, w], floating, not empty.
            images: [B, 3, H, W] uint8 RGB, of any size, covering the same area as ``low``.
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
        """Upsample as `forward` does, add an offset [k] float32, and encode; in one kernel if `can_quantize`."""
        quantization = encoding.quantization(offset)
        if quantization is not None and self.can_quantize((low.shape[2], low.shape[3]), size):
            return self.forward_codes(low, images, size, quantization)
        return encoding.encode(self(low, images, size), offset)

    def can_quantize(self, low: tuple[int, int], size: tuple[int, int]) -> bool:
        """Whether `forward_codes` supports this grid (h, w) and output size (H, W). By default: no."""
        return False

    def forward_codes(self, low: Tensor, images: Tensor, size: tuple[int, int], quantization: Quantization) -> Codes:
        """Upsample as `forward` does and quantize on the fly, without writing float features.

        Raises:
            NotImplementedError: not supported (see `can_quantize`).
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
        """Encode with the offset, which needs no separate pass over the features."""
        codes = self.upsampler.encode(self._projected(features), images, size, encoding, self.offset)
        return with_nonfinite(codes, {})

    @override
    def before_last_step(
        self, features: Tensor, images: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, dict[int, ImageError]]:
        """Project and centre: an upsampler with a `last_step` preserves constants, so the offset may come first."""
        check_images(features, images, size)
        return torch.einsum("bchw,ck->bkhw", features, self.projection) + self.offset[:, None, None], {}

    def _projected(self, features: Tensor) -> Tensor:
        """Project; on a GPU to float16, which is as precise as the stored values at half the bytes, else float32."""
        low = torch.einsum("bchw,ck->bkhw", features, self.projection)
        return low.half() if low.is_cuda else low


def with_nonfinite(values: Codes, failures: dict[int, ImageError]) -> Stored:
    """Combine values and known failures, adding a failure for every other image with non-finite values."""
    nonfinite = values.not_finite.nonzero().flatten().tolist()
    error = ImageError("nonfinite", "its features contain NaN or infinity")
    return Stored(values, {**dict.fromkeys(nonfinite, error), **failures})
