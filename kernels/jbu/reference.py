"""Joint bilateral upsampling in plain torch: the definition that every other implementation is tested against.

One stage doubles the resolution of its source: it computes an adaptive kernel per output pixel from the guidance image
(`learned_kernel` or `bilateral_kernel`), and `adaptive_conv_upsample2x` applies it. Everything here is differentiable
and runs in any floating dtype on any device. Arguments are checked by the public operations in `kernels.jbu`.

Kernels are [B, n*n, H, W] with n = 2*radius + 1, taps row-major: tap ``a*n + b`` is the weight of pixel ``(y + a -
radius, x + b - radius)``, reflected at the border without repeating the edge.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import Kind
from kernels.jbu.parameters import StageParameters

__all__ = [
    "adaptive_conv_upsample2x",
    "bilateral_kernel",
    "bilateral_stage",
    "kernel_from_range_products",
    "learned_kernel",
    "learned_stage",
    "range_products",
    "reasons_not",
]

FIXUP_WEIGHT = 0.1  # published factor of the learned correction, which is added to the normalised kernel


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, the reference takes all that the public ops accept."""
    return []


def range_products(keys: Tensor, radius: int) -> Tensor:
    """Dot products of each pixel's key with its neighbours' keys: FeatUp (arXiv 2403.10516), exponent of equation 6.

    Args:
        keys: [B, D, H, W], floating; H and W > radius.
        radius: radius of the neighbourhood.

    Returns:
        [B, n*n, H, W], dtype of keys.
    """
    return torch.stack([(keys * tap).sum(1) for tap in _shifted(keys, radius)], dim=1)


def learned_kernel(guidance: Tensor, stage: StageParameters) -> Tensor:
    """FeatUp's kernel: softmax over key products × spatial Gaussian, normalised, plus a learned correction.

    FeatUp (arXiv 2403.10516), equations 5-7, and the correction of the published weights, which is added after the
    normalisation: weights may be negative and need not sum to 1.

    Args:
        guidance: [B, guidance_dim, H, W], floating, ImageNet-normalised, H and W > radius.
        stage: parameters, in the guidance's dtype and on its device.

    Returns:
        [B, n*n, H, W], dtype of guidance.
    """
    keys = stage.keys(guidance)
    return kernel_from_range_products(range_products(keys, stage.radius), guidance, stage)


def kernel_from_range_products(products: Tensor, guidance: Tensor, stage: StageParameters) -> Tensor:
    """The second part of `learned_kernel`, after the products of each pixel's key with its neighbours' keys.

    Args:
        products: [B, n*n, H, W], `range_products` of the keys.
        guidance: [B, guidance_dim, H, W].
        stage: parameters.

    Returns:
        [B, n*n, H, W], dtype of products.
    """
    range_kernel = torch.softmax(stage.range_temp.exp().clamp(1e-4, 1e4) * products, dim=1)
    offsets = torch.arange(-stage.radius, stage.radius + 1, dtype=products.dtype, device=products.device)
    squares = (offsets / stage.radius).square()
    distances = (squares[:, None] + squares[None, :]).flatten()[:, None, None]  # [n*n, 1, 1], radius = 1
    kernel = range_kernel * torch.exp(-distances / (2 * stage.sigma_spatial.square()))
    kernel = kernel / kernel.sum(1, keepdim=True).clamp_min(1e-7)
    return kernel + FIXUP_WEIGHT * stage.fixup(torch.cat([kernel, guidance], dim=1))


def bilateral_kernel(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3) -> Tensor:
    """The training-free kernel: spatial Gaussian × colour Gaussian, normalised over the taps.

    Kopf et al., Joint Bilateral Upsampling (SIGGRAPH 2007), equation 3, with both Gaussians on the output's grid.

    Args:
        guidance: [B, G, H, W], floating and finite, H and W > radius.
        sigma_spatial: spatial standard deviation, in pixels of the guidance; > 0.
        sigma_range: standard deviation of the range kernel, in units of the guidance (Euclidean distance over its
            channels); > 0.
        radius: radius of the kernel, in pixels of the guidance.

    Returns:
        [B, n*n, H, W], dtype of guidance; non-negative, sums to 1 over taps.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=guidance.dtype, device=guidance.device)
    squares = (offsets / sigma_spatial).square()  # divided first: σ² may not be representable in this dtype
    spatial = (squares[:, None] + squares[None, :]).flatten()[:, None, None]
    taps = _shifted(guidance, radius)
    colour = torch.stack([((guidance - tap) / sigma_range).square().sum(1) for tap in taps], dim=1)
    return torch.softmax(-(spatial + colour) / 2, dim=1)


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor) -> Tensor:
    """Upsample ×2 bicubically, then weight each output pixel's n × n neighbourhood with its own kernel.

    Bicubic with align_corners=False and a = −0.75 (Keys 1981, as in PyTorch); reflect padding;
    FeatUp's adaptive convolution (arXiv 2403.10516, equation 4).

    Args:
        source: [B, C, h, w], floating.
        kernel: [B, n*n, 2h, 2w], dtype of source; 2h and 2w > radius.

    Returns:
        [B, C, 2h, 2w], dtype of source, in channels_last memory format.
    """
    radius = math.isqrt(kernel.shape[1]) // 2
    high = F.interpolate(source, scale_factor=2, mode="bicubic", align_corners=False)
    output = torch.zeros_like(high)
    for weight, tap in zip(kernel.unbind(1), _shifted(high, radius), strict=True):
        output = output + weight[:, None] * tap
    return output.contiguous(memory_format=torch.channels_last)


def bilateral_stage(source: Tensor, guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int) -> Tensor:
    """`bilateral_kernel` of the guidance [B, G, 2h, 2w], applied to the source [B, C, h, w].

    Returns:
        [B, C, 2h, 2w], dtype of source, channels_last.
    """
    kernel = bilateral_kernel(guidance, sigma_spatial, sigma_range, radius)
    return adaptive_conv_upsample2x(source, kernel.to(source.dtype))


def learned_stage(source: Tensor, guidance: Tensor, stage: StageParameters) -> Tensor:
    """`learned_kernel` of the guidance [B, guidance_dim, 2h, 2w], applied to the source [B, C, h, w].

    Returns:
        [B, C, 2h, 2w], dtype of source, channels_last.
    """
    return adaptive_conv_upsample2x(source, learned_kernel(guidance, stage).to(source.dtype))


def _shifted(image: Tensor, radius: int) -> Iterator[Tensor]:
    """The image shifted for each tap of an n × n window, row-major: n*n views [B, C, H, W]."""
    H, W = image.shape[-2:]
    padded = F.pad(image, [radius] * 4, mode="reflect")
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            yield padded[..., dy : dy + H, dx : dx + W]
