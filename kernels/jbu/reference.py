"""Joint bilateral upsampling in plain torch: the definition that every other implementation is tested against.

One stage doubles the resolution of its source: it computes an adaptive kernel per output pixel from the guidance image
(`learned_kernel` or `bilateral_kernel`), and `adaptive_conv_upsample2x` applies it. Everything here is differentiable
and runs in any floating dtype on any device. Arguments are checked by the public operations in `kernels.jbu`. The
training-free parts lie in `densefeat.torch.bilateral`, because readers of stores use them too; it also says how kernels
[B, n*n, H, W] are laid out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from densefeat.torch.bilateral import adaptive_conv_upsample2x, bilateral_kernel, bilateral_stage, shifted
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
    return torch.stack([(keys * tap).sum(1) for tap in shifted(keys, radius)], dim=1)


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


def learned_stage(source: Tensor, guidance: Tensor, stage: StageParameters) -> Tensor:
    """`learned_kernel` of the guidance [B, guidance_dim, 2h, 2w], applied to the source [B, C, h, w].

    Returns:
        [B, C, 2h, 2w], dtype of source, channels_last.
    """
    return adaptive_conv_upsample2x(source, learned_kernel(guidance, stage).to(source.dtype))
