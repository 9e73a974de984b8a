"""Upsampling: low-res features and their image -> high-res features; one class an upsampler.

PCA moves in front. All upsamplers here are linear in the features and treat every channel alike, so projecting C
channels to k first and upsampling those gives the same result as upsampling C and projecting, at k/C of the cost.
`Upsampler.fold` says with which matrix and offset.
"""

import difflib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.jbu import JBUStack, adaptive_conv_upsample2x, bilateral_kernel, learned_kernel
from pipeline.errors import JobError
from pipeline.weights import load_strict, read_state_dict, state_digest

__all__ = ["JBU", "UPSAMPLERS", "Bilinear", "Folding", "Upsampler", "build_upsampler"]

# What else published checkpoints hold, all of it for training: backbone, attention downsampler, uncertainty.
_TRAINING_ONLY = ("model", "downsampler", "scale_net")
_FINAL_WEIGHT = 0.1  # published: how much of the final 1×1 convolution is added to the last stage
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Folding:
    """How PCA moves in front of an upsampler U: ``(Y - mean) @ components.T == U(X @ projection) + offset``.

    Attributes:
        projection: [C, k] float32. X is not centred first: learned kernels do not sum to 1.
        offset: [k] float32, added after upsampling.
    """

    projection: Tensor
    offset: Tensor


class Upsampler(nn.Module):
    """A linear map from low-res to high-res features, guided by the image, the same for every channel."""

    name: ClassVar[str]

    def identity(self) -> dict[str, object]:
        """Say what the output depends on besides the inputs, for the configuration hash: a JSON-able dictionary."""
        return {"name": self.name}

    def fold(self, mean: Tensor, components: Tensor) -> Folding:
        """Fold a PCA basis, and what the upsampler does across channels, into one projection before it.

        Args:
            mean: [C], floating.
            components: [k, C], floating, orthonormal rows.

        Returns:
            The folding, computed in float64. Here: of a map that keeps constants, with nothing across channels.

        Raises:
            ValueError: the shapes do not agree.
        """
        mean, components = _checked_basis(mean, components)
        return Folding(components.T.contiguous().float(), -(components @ mean).float())

    @abstractmethod
    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample features that were projected with `fold`'s projection (its offset is left to the caller).

        Args:
            low: [B, k, h, w], floating.
            images: [B, 3, H, W] uint8 RGB, of any size, showing what ``low`` shows.
            size: height and width of the output.

        Returns:
            [B, k, *size], float32 (on a GPU: dtype of ``low``).

        Raises:
            ValueError: an argument is not as above.
        """


class Bilinear(Upsampler):
    """Bilinear interpolation, align_corners=False; the baseline. The image is not looked at."""

    name = "bilinear"

    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """As `Upsampler.forward`."""
        _check_inputs(low, images, size)
        return _resize(_working_dtype(low), size)


class JBU(Upsampler):
    """Joint bilateral upsampling in ×2 stages: training-free, or FeatUp's with its weights (arXiv 2403.10516).

    Training-free: as many stages as reach ``size``, each with Kopf et al.'s bilateral kernel on RGB in [0, 1].
    With weights: four stages, so ×16. In both cases one bilinear interpolation ends at ``size`` exactly, and also
    goes beyond ×16: the image is then not looked at in that last step.

    Args:
        stack: learned parameters; None is training-free.
    """

    name = "jbu"
    # Chosen by looking at the first three components of EfficientNet-Lite0's features (14×14 -> 224) of COCO photos,
    # σ_spatial 1…3 pixels × σ_range 0.05…0.2. At (1, 0.05) the low-res grid shows through; at 3, or 2 and more on
    # stripes, texture prints into the features and small objects fade; at σ_range 0.2 edges no longer snap.
    radius = 3
    sigma_spatial = 1.5
    sigma_range = 0.1

    mean: Tensor
    std: Tensor

    def __init__(self, stack: JBUStack | None = None) -> None:
        super().__init__()
        self.stack = None if stack is None else stack.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_weights(cls, uri: str, num_chs: int) -> "JBU":
        """Load FeatUp's published weights, every one of them.

        Args:
            uri: checkpoint, local or remote; names may begin with ``upsampler.``, and what is there for training
                only (``model.*``, ``downsampler.*``, ``scale_net.*``) is left out.
            num_chs: channels of the backbone's features.

        Raises:
            JobError: unreadable; tensors missing, unexpected or misshapen; made for another number of channels.
        """
        state = _upsampler_state(read_state_dict(uri))
        final = state.get("fixup_proj.1.weight")
        if final is not None and final.shape[0] != num_chs:
            raise JobError(
                f"JBU weights {uri} are for features of {final.shape[0]} channels, the backbone makes {num_chs}. "
                "Choose the weights trained for this backbone, or none for the training-free upsampler."
            )
        stack = JBUStack(num_chs)
        load_strict(stack, state, what=f"JBU weights {uri}")
        return cls(stack)

    def identity(self) -> dict[str, object]:
        """As `Upsampler.identity`: the weights' digest, or the training-free parameters."""
        if self.stack is not None:
            return {"name": self.name, "weights": state_digest(self.stack.state_dict())}
        parameters = {"radius": self.radius, "sigma_spatial": self.sigma_spatial, "sigma_range": self.sigma_range}
        return {"name": self.name, **parameters}

    def fold(self, mean: Tensor, components: Tensor) -> Folding:
        """As `Upsampler.fold`, with the final convolution Y = U + 0.1·(W·U + b) folded in as well."""
        if self.stack is None:
            return super().fold(mean, components)
        mean, components = _checked_basis(mean, components)
        final = self.stack.final
        if final.in_channels != mean.numel():
            raise ValueError(f"mean: got {mean.numel()} channels, need the weights' {final.in_channels}")
        assert final.bias is not None
        weight, bias = (_FINAL_WEIGHT * p.detach().double().to(mean.device) for p in (final.weight, final.bias))
        projection = components.T + weight[:, :, 0, 0].T @ components.T  # (I + 0.1 W)ᵀ P
        return Folding(projection.float(), (components @ (bias - mean)).float())

    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """As `Upsampler.forward`; without the final convolution, which is in the projection."""
        _check_inputs(low, images, size)
        high, pixels = _working_dtype(low), images.float() / 255
        if self.stack is not None:
            normalised = (pixels - self.mean) / self.std  # ImageNet's for every backbone, as published
            return _resize(self.apply_stages(high, normalised), size)
        for _ in range(_doublings(low.shape[2:], size)):
            guidance = _guidance(pixels, high)
            kernel = bilateral_kernel(guidance, self.sigma_spatial, self.sigma_range, self.radius)
            high = adaptive_conv_upsample2x(high, kernel.to(high.dtype))
        return _resize(high, size)

    def apply_stages(self, source: Tensor, guidance: Tensor) -> Tensor:
        """Run the four learned stages: [B, k, h, w] and a normalised image [B, 3, H, W], floating -> [B, k, 16h, 16w].

        Raises:
            ValueError: this upsampler is training-free and has no stages.
        """
        if self.stack is None:
            raise ValueError("stack: got None, need learned weights: the training-free upsampler has no stages")
        for stage in self.stack.stages:
            kernel = learned_kernel(_guidance(guidance, source), stage)
            source = adaptive_conv_upsample2x(source, kernel.to(source.dtype))
        return source

    def apply_final(self, features: Tensor) -> Tensor:
        """Add the final convolution to all C channels [B, C, H, W]: Y = U + 0.1·(W·U + b). Training-free: nothing."""
        if self.stack is None:
            return features
        final = self.stack.final
        if final.in_channels != features.shape[1]:
            raise ValueError(f"features: got {features.shape[1]} channels, need the weights' {final.in_channels}")
        assert final.bias is not None
        mixed = F.conv2d(features, final.weight.to(features.dtype), final.bias.to(features.dtype))
        return features + _FINAL_WEIGHT * mixed

    def forward_full(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample all C channels, final convolution included.

        Args:
            features: [B, C, h, w], floating, neither projected nor centred.
            images: [B, 3, H, W] uint8 RGB.
            size: height and width of the output.

        Returns:
            [B, C, *size], float32 (on a GPU: dtype of ``features``).

        Raises:
            ValueError: an argument is not as above.
        """
        return self.apply_final(self.forward(features, images, size))


UPSAMPLERS: dict[str, type[Upsampler]] = {"bilinear": Bilinear, "jbu": JBU}


def build_upsampler(name: str, weights: str | None, num_chs: int) -> Upsampler:
    """Build the upsampler a job's configuration names, in evaluation mode, on the CPU.

    Args:
        name: a name in `UPSAMPLERS`.
        weights: URI of its checkpoint, or None.
        num_chs: channels of the backbone's features.

    Raises:
        JobError: no such upsampler; weights for one that has none; weights that do not fit (`JBU.from_weights`).
    """
    if name not in UPSAMPLERS:
        near = difflib.get_close_matches(name, UPSAMPLERS)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise JobError(f"upsampler: got {name!r}, expected one of {', '.join(UPSAMPLERS)}.{hint}")
    if weights is None:
        return UPSAMPLERS[name]().eval()
    if name != "jbu":
        raise JobError(f"upsampler_weights: got {weights!r} for {name!r}, which has no weights. Leave them out.")
    return JBU.from_weights(weights, num_chs).eval()


def _upsampler_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The upsampler's tensors, without prefix; names that nobody knows stay, for `load_strict` to report."""
    kept = {name: tensor for name, tensor in state.items() if name.split(".", 1)[0] not in _TRAINING_ONLY}
    if not any(name.startswith("upsampler.") for name in kept):
        return kept
    # A name without the prefix, among names with it, is no tensor of the upsampler, whatever it is called.
    return {n.removeprefix("upsampler.") if n.startswith("upsampler.") else f"<no prefix> {n}": kept[n] for n in kept}


def _checked_basis(mean: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or components.ndim != 2 or components.shape[1] != mean.shape[0]:
        raise ValueError(
            f"components: got shape {tuple(components.shape)}, need [k, C] for a mean [C] of {tuple(mean.shape)}"
        )
    return mean.detach().double(), components.detach().double()


def _check_inputs(low: Tensor, images: Tensor, size: tuple[int, int]) -> None:
    if low.ndim != 4 or not low.is_floating_point() or low.numel() == 0:
        raise ValueError(f"low: got {tuple(low.shape)} {low.dtype}, need [B, k, h, w] of a floating dtype, not empty")
    if images.ndim != 4 or images.shape[:2] != (low.shape[0], 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images: got {tuple(images.shape)} {images.dtype}, need [{low.shape[0]}, 3, H, W] of uint8 RGB"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: got {size}, need height and width of at least 1")


def _working_dtype(low: Tensor) -> Tensor:
    """A CPU computes in float32: half precision is slower there, and not faster to store."""
    return low if low.is_cuda else low.float()


def _doublings(low: torch.Size, size: tuple[int, int]) -> int:
    """The smallest n with low * 2^n >= size on both axes."""
    n = 0
    while low[0] << n < size[0] or low[1] << n < size[1]:
        n += 1
    return n


def _guidance(pixels: Tensor, source: Tensor) -> Tensor:
    """The image at twice the source's size, in float32: colour distances suffer in half precision, kernels less."""
    return F.adaptive_avg_pool2d(pixels, (2 * source.shape[2], 2 * source.shape[3]))


def _resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear. Linear in the features and keeps constants, so `Upsampler.fold` holds through it."""
    if features.shape[2:] == size:
        return features
    # Down to half the size, plain bilinear interpolation looks at every pixel; antialiasing costs as much as a stage
    # (50 of 108 ms an image on one core, 256 -> 224, k = 64) and is left to where pixels would be passed over.
    skips = features.shape[2] > 2 * size[0] or features.shape[3] > 2 * size[1]
    return F.interpolate(features, size, mode="bilinear", align_corners=False, antialias=skips)
