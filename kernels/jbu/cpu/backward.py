"""Gradients of the compiled operations. One thread gathers each element in a fixed order, without atomics.

Notation and layouts as in `kernels.jbu.cpu.conv` and `kernels.jbu.cpu.kernel_rows`. The gradient of the adaptive
convolution's kernel needs no code here: it consists of products of the output's gradient with the upsampled source.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.compilation import compiled
from kernels.jbu.cpu.conv import VECTORS, Fold, fold_block, fold_scratch, folding
from kernels.jbu.cpu.fillers import PAIRS, Consumer, Fillers
from kernels.jbu.cpu.layout import (
    STRIP,
    DType,
    aligned_empty,
    aligned_zeros,
    array_of,
    channel_vectors,
    image_rows,
    in_strips,
    reflected,
    vector_lanes,
)
from kernels.simd.memory import lanes, load, load_rows, load_tile, load_window, splats, store, store_tile, zeros
from kernels.simd.threads import in_threads, row_jobs
from kernels.simd.tiles import Array, fma, inlined, rows_of, summed_products

__all__ = ["keys_gradient", "source_gradient"]

_THREAD_ELEMENTS = 20_000  # minimum number of gradient elements that makes waking a thread worthwhile


def source_gradient(gradient: Tensor, kernels: Fillers, channels: int) -> Tensor:
    """Gradient of the adaptive convolution's source, [B, C, h, w], contiguous, from the output's, [B, C, 2h, 2w]."""
    B, H, W = kernels.shape
    h, w, L = H // 2, W // 2, vector_lanes(kernels.dtype)
    fold, high = folding(h, w, kernels.radius, kernels.dtype), channel_vectors(gradient, kernels.dtype)
    taps = fold_scratch(kernels.radius, kernels.dtype)[1].shape
    folded = aligned_empty((B, h, in_strips(W, L) // L, *taps), kernels.dtype)
    output = aligned_empty((B, h, w, high.shape[3]), kernels.dtype)

    def folder() -> Consumer:
        partial = fold_scratch(kernels.radius, kernels.dtype)[0]
        return lambda image, blocks, y: _fold_all(blocks, fold, partial, folded[image], y)

    def gather(job: tuple[int, int, int]) -> None:
        image, start, stop = job
        _of_source(folded[image], fold.rows.shape[1], high[image], output[image], start, stop)

    kernels.feed(folder)
    in_threads(row_jobs(B, h, PAIRS), lambda: gather, output.size // _THREAD_ELEMENTS)
    return torch.from_numpy(output)[..., :channels].permute(0, 3, 1, 2).contiguous()


def keys_gradient(gradient: Tensor, keys: Tensor, radius: int, dtype: DType) -> Tensor:
    """Gradient of keys [B, D, H, W], contiguous, from that of their products [B, n*n, H, W]; computed in dtype."""
    B, D, H, W = keys.shape
    n, width = 2 * radius + 1, in_strips(W + 2 * radius, vector_lanes(dtype))
    of_products = np.ascontiguousarray(array_of(gradient, dtype))
    rows = image_rows(array_of(keys, dtype), radius, 2 * radius, dtype)
    output = aligned_empty((B, D, H, W), dtype)

    def worker() -> Callable[[tuple[int, int, int]], None]:
        scratch = aligned_zeros((n, in_strips(n), width), dtype), aligned_zeros((D, width), dtype)

        def run(job: tuple[int, int, int]) -> None:
            image, start, stop = job
            _of_keys(of_products[image], rows[image], radius, *scratch, output[image], start, stop)

        return run

    in_threads(row_jobs(B, H, PAIRS), worker, output.size // _THREAD_ELEMENTS)
    return torch.from_numpy(output)


@compiled
def _fold_all(kernels: Array, fold: Fold, partial: Array, folded: Array, y: int) -> None:
    """Fold kernels of low-res rows y, y + 1, … to [h, blocks, N*N and more, 2*L]; partial as in `fold_block`."""
    for row in range(kernels.shape[0]):
        for block in range(kernels.shape[1]):
            fold_block(kernels, row, block, y + row, fold, partial, folded[y + row, block])


@inlined
def _pixel_of_source(folded: Array, N: int, gradient: Array, y: int, x: int, c: int, output: Array, zero: Any) -> None:
    """Compute pixel (y, x) for as many channels as a row of ``zero`` has; ``zero`` has two rows."""
    h, w, C = output.shape
    reach, half = N // 2, lanes(output) // 2
    upper, lower = zero, zero  # sums over the two high-res rows above a low-res row
    for j in range(max(0, y + reach + 1 - h), min(N, y + reach + 1)):
        of_y = y + reach - j
        for i in range(max(0, x + reach + 1 - w), min(N, x + reach + 1)):
            of_x = x + reach - i
            block, k, tap = of_x // half, of_x % half, j * N + i
            above = load_rows(gradient, (2 * of_y, 2 * of_x, c), zero, C)
            below = load_rows(gradient, (2 * of_y + 1, 2 * of_x, c), zero, C)
            upper = fma(splats(folded, (of_y, block, tap, 4 * k), zero), above, upper)
            lower = fma(splats(folded, (of_y, block, tap, 4 * k + 2), zero), below, lower)
    sums = upper + lower
    store_tile(output, (y, x, c), rows_of(sums, 0, 1) + rows_of(sums, 1, 1), 0, 2 * half)


@compiled
def _of_source(folded: Array, N: int, gradient: Array, output: Array, start: int, stop: int) -> None:
    """Compute the gradient of the source's rows start…stop, from the outputs that depend on them.

    Args:
        folded: [h, blocks, N*N and more, 2*L], from `_fold_all`.
        N: taps per side on the low-res grid.
        gradient: [H, W, C rounded up to whole vectors].
        output: [h, w, C rounded up to whole vectors].
        start: first row.
        stop: row after the last.
    """
    L, C = lanes(output), output.shape[2]
    many = C - C % (VECTORS * L)
    for y in range(start, stop):
        for x in range(output.shape[1]):
            for c in range(0, many, VECTORS * L):
                _pixel_of_source(folded, N, gradient, y, x, c, output, zeros(output, 2, VECTORS))
            for c in range(many, C, L):
                _pixel_of_source(folded, N, gradient, y, x, c, output, zeros(output, 2, 1))


@inlined
def _add(row: Array, to: Array, shift: int, W: int) -> None:
    """Add pixels 0…W of a row to another row, shifted by ``shift``; pixels that fall outside are skipped."""
    for x in range(max(0, -shift), min(W, to.size - shift)):
        to[x + shift] += row[x]


@inlined
def _pair_weights(gradient: Array, y: int, radius: int, weights: Array) -> None:
    """Compute the weight of each neighbour's key for padded row y: weights [n, n in whole strips, ≥ W + 2*radius].

    A product has two factors: tap t of pixel p multiplies the keys of p and p + t. So the key at p gathers from the
    taps of p and, where p + t is a pixel, from its tap −t, which is p.
    """
    T, H, W = gradient.shape
    n = 2 * radius + 1
    weights[:] = 0
    for t in range(T):
        a, b = t // n, t % n
        if 0 <= y < H:
            _add(gradient[t, y], weights[a, b], radius, W)
        if 0 <= y + a - radius < H:
            _add(gradient[T - 1 - t, y + a - radius], weights[a, b], 2 * radius - b, W)


@inlined
def _reflect_back(padded: Array, radius: int, output: Array) -> None:
    """Add the margins of a padded row [W + 2*radius and more] to the pixels that they reflect; writes [W]."""
    W = output.size
    for x in range(W):
        output[x] = padded[x + radius]
    for k in range(1, radius + 1):
        output[k] += padded[radius - k]
        output[W - 1 - k] += padded[radius + W - 1 + k]


@compiled
def _of_keys(
    gradient: Array, keys: Array, radius: int, weights: Array, sums: Array, output: Array, start: int, stop: int
) -> None:
    """Compute the gradient of the keys' rows start…stop, from that of their `products`.

    Args:
        gradient: [T, H, W].
        keys: [H, D, width], pixel 0 at column 2*radius.
        radius: radius of the neighbourhood.
        weights: scratch [n, n in whole strips, W + 2*radius in whole vectors].
        sums: scratch [D, W + 2*radius in whole vectors].
        output: [D, H, W].
        start: first row.
        stop: row after the last.
    """
    D, H, _ = output.shape
    n, L = 2 * radius + 1, lanes(keys)
    width = weights.shape[2]
    column = zeros(keys, STRIP, 1)
    for y in range(start, stop):
        sums[:] = 0
        for preimage in range(3):  # the rows of the padded image that reflect to this one
            padded_y = (y, -y, 2 * (H - 1) - y)[preimage]
            outside = -radius <= padded_y < 0 or H <= padded_y < H + radius
            if preimage > 0 and not outside:
                continue
            _pair_weights(gradient, padded_y, radius, weights)
            for a in range(n):
                row = reflected(padded_y + a - radius, H)
                for b in range(0, n, STRIP):
                    for x in range(0, width, L):
                        weighing = load_tile(weights, (a, b, x), STRIP, 1, width, 0)
                        for d in range(D):
                            window = load_window(keys, (row, d, x + b), column)
                            store(sums, (d, x), summed_products(weighing, window, load(sums, (d, x))))
        for d in range(D):
            _reflect_back(sums[d], radius, output[d, y])
