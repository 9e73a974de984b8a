"""Adaptive convolution on the low-res grid, compiled: kernels are folded to the grid of the source.

Bicubic ×2, reflect padding and the n × n adaptive convolution are all linear in the source, and separable except for
the kernel K itself. So the K of an output pixel folds into a kernel on the low-res grid, K' = Rᵀ·K·C, with small
matrices R and C per row and column (exact, borders included). This needs no high-res buffer, and the four outputs above
one low-res pixel use the same source vectors. Each vector is loaded once for four fused multiply-adds, and the sums
stay in registers over all taps. For 64 channels, 112 -> 224 pixels and radius 3, one core of a Xeon with AVX-512 took
0.5 ms to fold and 1.5 ms to convolve, the latter at 83% of its peak (204 GFLOP/s); the rest is memory.

Notation: h, w low-res and H, W = 2h, 2w high-res size; n = 2*radius + 1; N = 2*margin + 1 taps per side on the low-res
grid; L pixels in a vector. Kernels are stored in blocks of two high-res rows × L columns: [h, blocks, taps, 2, L].
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from kernels.compilation import compiled
from kernels.jbu.bicubic import WEIGHTS, first_source_pixel, margin
from kernels.jbu.cpu.layout import STRIP, DType, aligned_zeros, in_strips, vector_lanes
from kernels.simd.memory import lanes, load, load_row, load_tile, splat, splats, store_part, store_tile, zeros
from kernels.simd.tiles import VECTOR_BYTES, Array, fma, inlined, rows_of, swapped_pairs, width

__all__ = ["VECTORS", "Fold", "convolve", "fold_block", "fold_scratch", "folding"]

VECTORS = 4 if VECTOR_BYTES == 64 else 2  # source vectors at once: four times as many sums must fit in registers


class Fold(NamedTuple):
    """The matrices that fold kernels to the low-res grid, and the ranges in which they are not zero.

    Attributes:
        rows: [H, N, n]. Entry (Y, j, a) is the weight of source row Y//2 + j − margin in high-res row Y + a − radius.
        row_ends: [H, N, 2] int64: first a with a nonzero weight, and the a after the last.
        columns: [N, n, W rounded up to whole blocks]; the same along x, with x last.
        column_ends: [blocks, N, 2] int64: the same for all columns of a block together.
    """

    rows: Array
    row_ends: Array
    columns: Array
    column_ends: Array


@functools.lru_cache(maxsize=64)
def folding(h: int, w: int, radius: int, dtype: DType) -> Fold:
    """Folding matrices for a source of h × w pixels, in this dtype."""
    L = vector_lanes(dtype)
    blocks = in_strips(2 * w, L) // L
    rows, columns = _axis_matrices(h, radius), _axis_matrices(w, radius)
    columns = np.pad(columns, ((0, blocks * L - 2 * w), (0, 0), (0, 0)))
    of_blocks = np.abs(columns).reshape(blocks, L, *columns.shape[1:]).sum(1)
    return Fold(
        rows.astype(dtype), _ends(rows), np.ascontiguousarray(columns.transpose(1, 2, 0), dtype), _ends(of_blocks)
    )


def fold_scratch(radius: int, dtype: DType) -> tuple[Array, Array]:
    """Scratch memory for ``partial`` and ``folded`` of `fold_block`."""
    N, n, L = 2 * margin(radius) + 1, 2 * radius + 1, vector_lanes(dtype)
    return aligned_zeros((in_strips(N), in_strips(n), 2, L), dtype), aligned_zeros((N * in_strips(N), 2 * L), dtype)


def _ends(matrices: Array) -> Array:
    """Along the last axis, the first nonzero index and the index after the last one; 0, 0 where all are zero."""
    used = matrices != 0
    any_used = used.any(-1)
    first, last = used.argmax(-1), used.shape[-1] - used[..., ::-1].argmax(-1)
    return np.ascontiguousarray(np.stack([np.where(any_used, first, 0), np.where(any_used, last, 0)], -1))


def _axis_matrices(size: int, radius: int) -> Array:
    """Matrices of bicubic ×2 and reflection along one axis: [2*size, N, n], as `Fold.rows`."""
    reach = margin(radius)
    centre = np.arange(2 * size)[:, None]
    high = np.abs(centre + np.arange(-radius, radius + 1))  # [2*size, n], reflected at 0
    high = (2 * size - 1) - np.abs(2 * size - 1 - high)
    first = first_source_pixel(high)
    matrices = np.zeros((2 * size, 2 * reach + 1, 2 * radius + 1))
    taps = np.arange(2 * radius + 1)
    for k in range(4):
        low = np.clip(first + k, 0, size - 1)  # bicubic repeats the edge
        np.add.at(matrices, (centre, low - centre // 2 + reach, taps), WEIGHTS[high % 2, k])
    return matrices


@inlined
def fold_block(kernels: Array, row: int, block: int, y: int, fold: Fold, partial: Array, folded: Array) -> None:
    """Compute K' = Rᵀ·K·C of one block, which is above row y of the source.

    kernels [rows, blocks, taps, 2, L]; partial [N, n, 2, L] with N and n in whole strips, overwritten; folded
    [N*N and more, 2*L] gets, for each tap and low-res pixel x, the weights of the outputs (2y, 2x), (2y, 2x + 1),
    (2y + 1, 2x), (2y + 1, 2x + 1).
    """
    rows, row_ends, columns, column_ends = fold
    N, n = rows.shape[1:]
    L, room = lanes(kernels), partial.shape[1]
    for side in range(2):
        Y = 2 * y + side
        for b in range(0, n, STRIP):
            for j in range(N):
                sums = zeros(kernels, STRIP, 1)
                for a in range(row_ends[Y, j, 0], row_ends[Y, j, 1]):
                    taps = load_tile(kernels, (row, block, a * n + b, side, 0), STRIP, 1, 2 * L, 0)
                    sums = fma(splat(rows, (Y, j, a)), taps, sums)
                store_tile(partial, (j, b, side, 0), sums, 2 * L, 0)
    for i in range(N):
        for j in range(0, N, STRIP):
            sums = zeros(kernels, STRIP, 2)
            for b in range(column_ends[block, i, 0], column_ends[block, i, 1]):
                taps = load_tile(partial, (j, b, 0, 0), STRIP, 2, room * 2 * L, L)
                sums = fma(load(columns, (i, b, block * L)), taps, sums)
            store_tile(folded, (j * N + i, 0), swapped_pairs(sums), N * 2 * L, L)


@inlined
def _outputs(folded: Array, N: int, source: Array, y: int, x: int, c: int, output: Array, Y: int, zero: Any) -> None:
    """Compute the outputs above a block's low-res pixels, from x on, for as many channels as a row of ``zero`` has."""
    h, w, _ = source.shape
    C, L = output.shape[2], lanes(output)
    reach, left = N // 2, C - c
    for k in range(min(L // 2, w - x)):
        sums = zero
        for j in range(max(0, reach - y), min(N, h + reach - y)):
            for i in range(max(0, reach - x - k), min(N, w + reach - x - k)):
                vectors = load_row(source, (y + j - reach, x + k + i - reach, c), zero)
                sums = fma(splats(folded, (j * N + i, 4 * k), zero), vectors, sums)
        X = 2 * (x + k)
        if left >= width(zero):
            store_tile(output, (Y, X, c), rows_of(sums, 0, 2), C, L)
            store_tile(output, (Y + 1, X, c), rows_of(sums, 2, 2), C, L)
        else:
            store_part(output, (Y, X, c), rows_of(sums, 0, 1), left)
            store_part(output, (Y, X + 1, c), rows_of(sums, 1, 1), left)
            store_part(output, (Y + 1, X, c), rows_of(sums, 2, 1), left)
            store_part(output, (Y + 1, X + 1, c), rows_of(sums, 3, 1), left)


@compiled
def convolve(
    kernels: Array, source: Array, fold: Fold, partial: Array, folded: Array, output: Array, y: int, Y: int
) -> None:
    """Convolve low-res rows y, y + 1, … of an image, as many as there are rows of kernels.

    Args:
        kernels: [rows, blocks, taps, 2, L], where the taps axis has size `kernel_taps`.
        source: [h, w, C rounded up to whole vectors].
        fold: `folding` for the source's size.
        partial: scratch, see `fold_block`.
        folded: scratch, see `fold_block`.
        output: [≥ Y + 2*rows, W, C or more], written from row Y.
        y: first low-res row.
        Y: first row of the output.
    """
    C, L, N = source.shape[2], lanes(source), fold.rows.shape[1]
    many = C - C % (VECTORS * L)
    for row in range(kernels.shape[0]):
        for block in range(kernels.shape[1]):
            fold_block(kernels, row, block, y + row, fold, partial, folded)
            x = block * L // 2
            for c in range(0, many, VECTORS * L):
                _outputs(folded, N, source, y + row, x, c, output, Y + 2 * row, zeros(source, 4, VECTORS))
            for c in range(many, C, L):
                _outputs(folded, N, source, y + row, x, c, output, Y + 2 * row, zeros(source, 4, 1))
