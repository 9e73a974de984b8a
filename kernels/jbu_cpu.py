"""Joint bilateral upsampling on the CPU, compiled by numba: float32 inference, agreeing with `kernels.jbu_reference`.

Bicubic ×2, reflect padding and the n × n adaptive convolution are all linear in the source and separable but for the
kernel K itself. So one output pixel's K folds into a kernel on the *low-res* grid, K' = Rᵀ·K·C with R and C small
matrices per row and column (borders included, exactly): no high-res buffer, and the four outputs above one low-res
pixel read the same source vectors. Each output pixel is computed by one thread in a fixed order: results do not depend
on the number of threads. Threads are Python's: numba's own are neither thread- nor fork-safe.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from kernels.jbu_reference import JBUStage, kernel_from_range_products

__all__ = ["adaptive_conv_upsample2x", "bilateral_kernel", "learned_kernel", "reasons_not"]

Array = npt.NDArray[Any]

# "contract" allows fused multiply-adds. Not all of fast-math: NaN features must come out as NaN.
_compiled = njit(nogil=True, cache=True, fastmath={"contract"})
_UNROLL = 7  # taps summed per pass over the channels: the output is then loaded and stored once per 7 products


def reasons_not(*tensors: Tensor) -> list[str]:
    """Every reason why this implementation cannot take these inputs; none if it can.

    It takes float32 on the CPU in any memory layout, where no gradient is needed. Other dtypes go to the reference:
    computing them in float32 here would silently change a float64 result.
    """
    devices = sorted({str(t.device) for t in tensors if t.device.type != "cpu"})
    dtypes = sorted({str(t.dtype) for t in tensors if t.dtype != torch.float32})
    reasons = []
    if devices:
        reasons.append(f"it runs on the CPU, inputs are on {', '.join(devices)}")
    if dtypes:
        reasons.append(f"it computes in float32, inputs are {', '.join(dtypes)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("it has no backward pass, inputs require a gradient (use torch.no_grad() for inference)")
    return reasons


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor) -> Tensor:
    """As `kernels.jbu_reference.adaptive_conv_upsample2x`.

    Args:
        source: [B, C, h, w] float32; channels_last saves a transposition.
        kernel: [B, n*n, 2h, 2w] float32.

    Returns:
        [B, C, 2h, 2w] float32, in channels_last memory format.
    """
    B, C, h, w = source.shape
    radius = math.isqrt(kernel.shape[1]) // 2
    margin = _margin(radius)
    padded = torch.zeros(B, h + 2 * margin, w + 2 * margin, C)  # the zeros are read, with weight 0
    padded[:, margin : margin + h, margin : margin + w] = source.detach().permute(0, 2, 3, 1)
    rows, columns = _axis_matrices(h, radius), _axis_matrices(w, radius)
    output = torch.empty(B, 2 * h, 2 * w, C)
    arguments = padded.numpy(), _array(kernel), rows, np.ascontiguousarray(columns.transpose(1, 2, 0)), output.numpy()
    _over_rows(B * h, lambda start, stop: _adaptive_conv(*arguments, start, stop))
    return output.permute(0, 3, 1, 2)


def bilateral_kernel(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3) -> Tensor:
    """As `kernels.jbu_reference.bilateral_kernel`: [B, G, H, W] float32 -> [B, n*n, H, W] float32, contiguous."""
    B, _, H, W = guidance.shape
    squares = np.arange(-radius, radius + 1, dtype=np.float64) ** 2
    spatial = (-(squares[:, None] + squares[None, :]) / (2 * sigma_spatial**2)).ravel().astype(np.float32)
    output = torch.empty(B, spatial.size, H, W)
    arguments = _reflected(guidance, radius), spatial, np.float32(-0.5 / sigma_range**2), output.numpy()
    _over_rows(B * H, lambda start, stop: _bilateral(*arguments, start, stop))
    return output


def learned_kernel(guidance: Tensor, stage: JBUStage) -> Tensor:
    """As `kernels.jbu_reference.learned_kernel`: [B, guidance_dim, H, W] float32 -> [B, n*n, H, W] float32.

    The key products are compiled; the 1×1 convolutions and the softmax are torch's.
    """
    B, _, H, W = guidance.shape
    keys = stage.range_proj(guidance).detach()
    keys = F.pad(keys, [0, 0, 0, 0, 0, -keys.shape[1] % 4])
    products = torch.empty(B, (2 * stage.radius + 1) ** 2, H, W)
    arguments = _array(keys), _reflected(keys, stage.radius), products.numpy()
    _over_rows(B * H, lambda start, stop: _key_products(*arguments, start, stop))
    return kernel_from_range_products(products, guidance, stage).detach()


def _over_rows(count: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(start, stop)`` over 0…count on torch's number of threads; a pool per call, so that forks are safe."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        work(0, count)
        return
    step = math.ceil(count / (4 * threads))  # smaller than a thread's share: a thread held up elsewhere delays less
    starts = range(0, count, step)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, starts, [min(start + step, count) for start in starts]))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


def _reflected(image: Tensor, radius: int) -> Array:
    return _array(F.pad(image.detach(), [radius] * 4, mode="reflect"))


def _margin(radius: int) -> int:
    """How far, in low-res pixels, an output pixel's n × n high-res window reaches, bicubic taps included."""
    return radius // 2 + 2


@functools.lru_cache(maxsize=64)
def _axis_matrices(size: int, radius: int) -> Array:
    """Bicubic ×2 and reflection along one axis: [2*size, N, n] float32, N = 2*margin + 1.

    Entry (Y, j, a) is the weight of source pixel Y//2 + j − margin in high-res pixel Y + a − radius.
    """
    a = -0.75  # Keys 1981, equation 4, with PyTorch's constant
    near = lambda x: (a + 2) * x**3 - (a + 3) * x**2 + 1  # noqa: E731
    far = lambda x: a * (x**3 - 5 * x**2 + 8 * x - 4)  # noqa: E731
    odd = np.array([far(1.25), near(0.25), near(0.75), far(1.75)])  # high-res pixel 2i + 1 lies at i + 1/4
    coefficients = np.stack([odd[::-1], odd])

    margin = _margin(radius)
    centre = np.arange(2 * size)[:, None]
    high = np.abs(centre + np.arange(-radius, radius + 1))  # [2*size, n], reflected at 0
    high = (2 * size - 1) - np.abs(2 * size - 1 - high)
    first = high // 2 - 2 + high % 2
    matrices = np.zeros((2 * size, 2 * margin + 1, 2 * radius + 1))
    taps = np.arange(2 * radius + 1)
    for k in range(4):
        low = np.clip(first + k, 0, size - 1)  # bicubic repeats the edge
        np.add.at(matrices, (centre, low - centre // 2 + margin, taps), coefficients[high % 2, k])
    return matrices.astype(np.float32)


@_compiled
def _fold_row(kernel: Array, row: Array, columns: Array, partial: Array, folded: Array) -> None:
    """One row of K' = Rᵀ·K·C. kernel [n*n, W], row [N, n], columns [N, n, W], partial [n, W], folded [≥ N*N, W]."""
    N, n = row.shape
    W = kernel.shape[1]
    for j in range(N):
        partial[:] = 0
        for a in range(n):
            weight = row[j, a]
            if weight != 0:  # a high-res row has four taps of the N
                for b in range(n):
                    taps, sums = kernel[a * n + b], partial[b]
                    for x in range(W):
                        sums[x] += weight * taps[x]
        for i in range(N):
            sums = folded[j * N + i]
            sums[:] = 0
            for b in range(n):
                weights, taps = columns[i, b], partial[b]
                for x in range(W):
                    sums[x] += weights[x] * taps[x]


@_compiled
def _adaptive_conv(
    padded: Array, kernel: Array, rows: Array, columns: Array, output: Array, start: int, stop: int
) -> None:
    """Low-res rows start…stop of all images: padded [B, h+2m, w+2m, C], kernel [B, n*n, H, W], output [B, H, W, C]."""
    h, W, C = output.shape[1] // 2, output.shape[2], output.shape[3]
    N, n = rows.shape[1:]
    passes = (N * N + _UNROLL - 1) // _UNROLL
    folded = np.zeros((passes * _UNROLL, W), np.float32)  # taps past N*N keep weight 0, on the window's first pixel
    partial = np.empty((n, W), np.float32)
    width = padded.shape[2]
    tap = np.zeros(passes * _UNROLL, np.int64)
    for t in range(N * N):
        tap[t] = t // N * width + t % N
    for item in range(start, stop):
        image, y = item // h, item % h
        low = padded[image].reshape(-1, C)
        for Y in range(2 * y, 2 * y + 2):
            _fold_row(kernel[image, :, Y], rows[Y], columns, partial, folded)
            for X in range(W):
                first = y * width + X // 2
                sums = output[image, Y, X]
                sums[:] = 0
                for t in range(0, passes * _UNROLL, _UNROLL):
                    w0, s0 = folded[t, X], low[first + tap[t]]
                    w1, s1 = folded[t + 1, X], low[first + tap[t + 1]]
                    w2, s2 = folded[t + 2, X], low[first + tap[t + 2]]
                    w3, s3 = folded[t + 3, X], low[first + tap[t + 3]]
                    w4, s4 = folded[t + 4, X], low[first + tap[t + 4]]
                    w5, s5 = folded[t + 5, X], low[first + tap[t + 5]]
                    w6, s6 = folded[t + 6, X], low[first + tap[t + 6]]
                    for c in range(C):
                        sums[c] += (
                            w0 * s0[c] + w1 * s1[c] + w2 * s2[c] + w3 * s3[c] + w4 * s4[c] + w5 * s5[c] + w6 * s6[c]
                        )


@_compiled
def _exp(x: Any) -> Any:
    """e^x for x ≤ 0 in float32, to about 1e-5 relative; e^-87 below −87. Written out: libm's does not vectorise."""
    scaled = max(x, np.float32(-87.0)) * np.float32(math.log2(math.e))
    whole = np.int32(scaled - np.float32(0.5))  # towards zero, so the nearest integer for scaled ≤ 0
    f = (scaled - np.float32(whole)) * np.float32(math.log(2))  # |f| ≤ 0.35: Taylor's 7 terms are enough
    series = np.float32(1 / 720)
    for k in (120, 24, 6, 2, 1, 1):
        series = series * f + np.float32(1 / k)
    return series * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled
def _bilateral(padded: Array, spatial: Array, range_factor: Any, output: Array, start: int, stop: int) -> None:
    """Rows start…stop of all images: padded [B, G, H+2r, W+2r], spatial exponents [n*n], output [B, n*n, H, W]."""
    H, W = output.shape[2:]
    n = padded.shape[2] - H + 1
    r = n // 2
    distance, total = np.empty(W, np.float32), np.empty(W, np.float32)
    for item in range(start, stop):
        image, y = item // H, item % H
        total[:] = 0
        for t in range(n * n):
            a, b = t // n, t % n
            distance[:] = 0
            for g in range(padded.shape[1]):
                here, there = padded[image, g, y + r], padded[image, g, y + a]
                for x in range(W):
                    difference = here[x + r] - there[x + b]
                    distance[x] += difference * difference
            weights = output[image, t, y]
            for x in range(W):
                weights[x] = _exp(spatial[t] + range_factor * distance[x])
                total[x] += weights[x]
        for t in range(n * n):
            weights = output[image, t, y]
            for x in range(W):
                weights[x] /= total[x]  # at least 1: the centre's own weight


@_compiled
def _key_products(keys: Array, padded: Array, output: Array, start: int, stop: int) -> None:
    """Rows start…stop of all images: keys [B, D, H, W] with 4 | D, padded [B, D, H+2r, W+2r], output [B, n*n, H, W]."""
    H, W = output.shape[2:]
    n = padded.shape[2] - H + 1
    for item in range(start, stop):
        image, y = item // H, item % H
        for t in range(n * n):
            sums = output[image, t, y]
            sums[:] = 0
            dy, dx = t // n, t % n
            for d in range(0, keys.shape[1], 4):  # four channels to one load and store of the sums
                k0, s0 = keys[image, d, y], padded[image, d, y + dy, dx:]
                k1, s1 = keys[image, d + 1, y], padded[image, d + 1, y + dy, dx:]
                k2, s2 = keys[image, d + 2, y], padded[image, d + 2, y + dy, dx:]
                k3, s3 = keys[image, d + 3, y], padded[image, d + 3, y + dy, dx:]
                for x in range(W):
                    sums[x] += k0[x] * s0[x] + k1[x] * s1[x] + k2[x] * s2[x] + k3[x] * s3[x]
