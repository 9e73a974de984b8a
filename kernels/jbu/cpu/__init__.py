"""Joint bilateral upsampling on the CPU, compiled by numba: agrees with `kernels.jbu.reference`, forward and backward.

float32 and float64 are computed in their own precision; float16 and bfloat16 in float32, rounded once at the end. Every
element is computed by one thread, in an order that depends only on its position, not on the number of threads or the
rest of the batch. A stage goes from guidance to features or codes a few rows at a time, which stay in a core's cache.

`layout` defines the arrays in memory. `kernel_rows` computes rows of kernels, and `fillers` calls it; `conv`, `codes`
and `backward` do the rest. All are built on `kernels.simd`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import Kind, not_of_dtypes, not_on_cpu
from kernels.dtypes import FLOATING, HALF
from kernels.jbu.cpu import backward, fillers
from kernels.jbu.cpu.codes import quantize
from kernels.jbu.cpu.conv import convolve, fold_scratch, folding
from kernels.jbu.cpu.fillers import PAIRS, Consumer, Fillers
from kernels.jbu.cpu.layout import DType, aligned_zeros, array_of, channel_vectors, image_rows, torch_dtype, unpack
from kernels.jbu.parameters import StageParameters
from kernels.quantization import Codes, Quantization, quantized
from kernels.simd.tiles import Array

__all__ = [
    "FORWARD_MODE",
    "adaptive_conv_upsample2x",
    "adaptive_conv_upsample2x_backward",
    "bilateral_kernel",
    "bilateral_stage",
    "learned_kernel",
    "learned_stage",
    "range_products",
    "range_products_backward",
    "reasons_not",
]

FORWARD_MODE = False


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why this implementation cannot take inputs of these kinds; none if it can."""
    return [*not_on_cpu(kinds), *not_of_dtypes(kinds, FLOATING)]


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor) -> Tensor:
    """As `kernels.jbu.reference.adaptive_conv_upsample2x`, in any memory format; channels_last saves a transposition.

    In float32, weights below 2⁻¹⁰⁰ in magnitude are treated as 0: they are negligible next to others, and would take a
    hundred times as long.

    Args:
        source: [B, C, h, w].
        kernel: [B, n*n, 2h, 2w], dtype of source.

    Returns:
        [B, C, 2h, 2w], dtype of source, in channels_last memory format.
    """
    return _convolved(source, fillers.given(kernel, _radius(kernel), _working(source)))


def adaptive_conv_upsample2x_backward(
    gradient: Tensor, source: Tensor, kernel: Tensor, for_source: bool, for_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `adaptive_conv_upsample2x`.

    Args:
        gradient: gradient of the output, [B, C, 2h, 2w].
        source: [B, C, h, w].
        kernel: [B, n*n, 2h, 2w].
        for_source: whether the source's gradient is needed.
        for_kernel: whether the kernel's gradient is needed.

    Returns:
        Gradients of source and kernel, with their shapes and dtypes, contiguous; None where not needed.
    """
    dtype, radius = _working(source), _radius(kernel)
    of_source = of_kernel = None
    if for_source:
        kernels = fillers.given(kernel, radius, dtype)
        of_source = backward.source_gradient(gradient, kernels, source.shape[1]).to(source.dtype)
    if for_kernel:  # products of the output's gradient with the neighbours in the upsampled source
        bicubic = fillers.given(torch.ones(1).expand(len(source), 1, *kernel.shape[2:]), 0, dtype)
        high = _convolved(source.detach().to(torch_dtype(dtype)), bicubic)
        own, others = (image_rows(array_of(image, dtype), radius, radius, dtype) for image in (gradient, high))
        of_kernel = _unpacked(fillers.products(own, others, kernel.shape[3], radius)).to(kernel.dtype)
    return of_source, of_kernel


def range_products(keys: Tensor, radius: int) -> Tensor:
    """As `kernels.jbu.reference.range_products`: keys [B, D, H, W] -> [B, n*n, H, W], dtype of keys, contiguous."""
    dtype = _working(keys)
    rows = image_rows(array_of(keys, dtype), radius, radius, dtype)
    return _unpacked(fillers.products(rows, rows, keys.shape[3], radius)).to(keys.dtype)


def range_products_backward(gradient: Tensor, keys: Tensor, radius: int) -> Tensor:
    """Gradient of the keys [B, D, H, W] from that of their products [B, n*n, H, W]; dtype of keys, contiguous."""
    return backward.keys_gradient(gradient, keys, radius, _working(keys)).to(keys.dtype)


def bilateral_kernel(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int) -> Tensor:
    """As `kernels.jbu.reference.bilateral_kernel`: [B, G, H, W] -> [B, n*n, H, W], contiguous."""
    kernels = fillers.bilateral(guidance, sigma_spatial, sigma_range, radius, _working(guidance))
    return _unpacked(kernels).to(guidance.dtype)


def learned_kernel(guidance: Tensor, stage: StageParameters) -> Tensor:
    """As `kernels.jbu.reference.learned_kernel`: [B, G, H, W] -> [B, n*n, H, W], contiguous."""
    return _unpacked(fillers.learned(guidance, stage, _working(guidance))).to(guidance.dtype)


def bilateral_stage(
    source: Tensor,
    guidance: Tensor,
    sigma_spatial: float,
    sigma_range: float,
    radius: int,
    quantization: Quantization | None = None,
) -> Tensor | Codes:
    """As `kernels.jbu.reference.bilateral_stage`, optionally followed by `kernels.quantization.quantized`.

    Args:
        source: [B, C, h, w].
        guidance: [B, G, 2h, 2w], dtype of source or float32.
        sigma_spatial: spatial standard deviation, in pixels of the guidance.
        sigma_range: standard deviation of the range kernel, in units of the guidance.
        radius: radius of the kernel.
        quantization: quantization of the output; None for features.

    Returns:
        Features [B, C, 2h, 2w], dtype of source, channels_last; or their codes.
    """
    dtype = _working(source, guidance)
    kernels = fillers.bilateral(guidance, sigma_spatial, sigma_range, radius, dtype)
    return _convolved(source, kernels) if quantization is None else _quantized(source, kernels, quantization)


def learned_stage(
    source: Tensor, guidance: Tensor, stage: StageParameters, quantization: Quantization | None = None
) -> Tensor | Codes:
    """As `kernels.jbu.reference.learned_stage`, optionally followed by `kernels.quantization.quantized`.

    Args:
        source: [B, C, h, w].
        guidance: [B, G, 2h, 2w], dtype of source or float32.
        stage: parameters.
        quantization: quantization of the output; None for features.

    Returns:
        Features [B, C, 2h, 2w], dtype of source, channels_last; or their codes.
    """
    kernels = fillers.learned(guidance, stage, _working(source, guidance))
    return _convolved(source, kernels) if quantization is None else _quantized(source, kernels, quantization)


def _working(*tensors: Tensor) -> DType:
    """Dtype of the computation: float64 if any tensor has it, else float32."""
    return np.dtype(np.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else np.float32)


def _radius(kernel: Tensor) -> int:
    return math.isqrt(kernel.shape[1]) // 2


def _unpacked(kernels: Fillers) -> Tensor:
    """Kernels as a tensor [B, n*n, H, W]."""
    B, H, W = kernels.shape
    output = torch.empty(B, (2 * kernels.radius + 1) ** 2, H, W, dtype=torch_dtype(kernels.dtype))
    array = output.numpy()
    kernels.feed(lambda: lambda image, blocks, y: unpack(blocks, array[image], y))
    return output


def _convolved(source: Tensor, kernels: Fillers) -> Tensor:
    """The upsampled source: [B, C, 2h, 2w], dtype of source, channels_last."""
    B, C, h, w = source.shape
    low, fold = channel_vectors(source, kernels.dtype), folding(h, w, kernels.radius, kernels.dtype)
    output = torch.empty(B, 2 * h, 2 * w, C, dtype=torch_dtype(kernels.dtype))
    high = output.numpy()

    def consumer() -> Consumer:
        scratch = fold_scratch(kernels.radius, kernels.dtype)
        return lambda image, blocks, y: convolve(blocks, low[image], fold, *scratch, high[image], y, 2 * y)

    kernels.feed(consumer)
    return output.permute(0, 3, 1, 2).to(source.dtype)


def _quantized(source: Tensor, kernels: Fillers, quantization: Quantization) -> Codes:
    """Codes of the upsampled source."""
    if source.dtype in HALF:  # features are rounded before they are quantized
        return quantized(_convolved(source, kernels), quantization)
    B, C, h, w = source.shape
    low, fold = channel_vectors(source, kernels.dtype), folding(h, w, kernels.radius, kernels.dtype)
    step, offset = np.ones(low.shape[3], kernels.dtype), np.zeros(low.shape[3], kernels.dtype)
    step[:C], offset[:C] = (array_of(tensor, kernels.dtype) for tensor in (quantization.step, quantization.offset))
    codes = torch.empty(B, C, 2 * h, 2 * w, dtype=torch.int8)
    planes, counts = codes.numpy(), list[Array]()

    def consumer() -> Consumer:
        scratch = fold_scratch(kernels.radius, kernels.dtype)
        rows = aligned_zeros((2 * PAIRS, 2 * w, low.shape[3]), kernels.dtype)
        of_row = np.empty(rows.shape[1:], np.int8)
        count = np.zeros((B, 2), np.int64)
        counts.append(count)

        def consume(image: int, blocks: Array, y: int) -> None:
            convolve(blocks, low[image], fold, *scratch, rows, y, 0)
            quantize(rows[: 2 * len(blocks)], step, offset, of_row, planes[image], 2 * y, count[image])

        return consume

    kernels.feed(consumer)
    not_finite, clipped = (torch.tensor(count, dtype=torch.int32) for count in np.sum(counts, axis=0).T)
    return Codes(codes, not_finite, clipped)
