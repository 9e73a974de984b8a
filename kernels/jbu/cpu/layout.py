"""Memory layout of images and kernels in the compiled functions, and the conversions.

Images are stored in rows with margins, [H, channels, `row_width`], so that a pixel's neighbours in all channels are
close together, and reads past an edge need no test. Kernels are stored in blocks of two rows × L columns of pixels,
where L pixels fill a vector: [pairs of rows, blocks, `kernel_taps`, 2, L].
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.compilation import compiled
from kernels.simd.functions import TINY, without_denormals
from kernels.simd.memory import lanes, load, store
from kernels.simd.threads import in_threads, row_jobs
from kernels.simd.tiles import VECTOR_BYTES, Array, inlined

__all__ = [
    "STRIP",
    "DType",
    "aligned_empty",
    "aligned_zeros",
    "array_of",
    "channel_vectors",
    "image_rows",
    "in_strips",
    "kernel_blocks",
    "kernel_taps",
    "pack",
    "reflected",
    "row_width",
    "torch_dtype",
    "unpack",
    "vector_lanes",
]

DType = np.dtype[Any]

STRIP = 7  # taps computed at once; arrays over taps have whole strips, and values beyond the last tap are arbitrary


def in_strips(count: int, strip: int = STRIP) -> int:
    """``count`` rounded up to whole strips."""
    return -(-count // strip) * strip


def kernel_taps(radius: int) -> int:
    """Size of the tap axis: room for whole strips, both of all taps and of the last row of taps."""
    n = 2 * radius + 1
    return max(in_strips(n * n), (n - 1) * n + in_strips(n))


def vector_lanes(dtype: DType) -> int:
    """Number of elements in a vector."""
    return VECTOR_BYTES // dtype.itemsize


def aligned_zeros(shape: tuple[int, ...], dtype: DType) -> Array:
    """As `numpy.zeros`, aligned to vectors; `torch.zeros` would wake torch's threads, which then wait for more work."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + VECTOR_BYTES, np.uint8)
    start = -raw.ctypes.data % VECTOR_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_empty(shape: tuple[int, ...], dtype: DType) -> Array:
    """As `numpy.empty`, aligned to vectors. For large arrays: torch reuses memory that is already mapped."""
    array: Array = torch.empty(shape, dtype=torch_dtype(dtype)).numpy()
    return array


def kernel_blocks(pairs: int, W: int, radius: int, dtype: DType) -> Array:
    """Allocate blocks for the kernels of ``pairs`` pairs of rows."""
    L = vector_lanes(dtype)
    return aligned_zeros((pairs, in_strips(W, L) // L, kernel_taps(radius), 2, L), dtype)


def row_width(W: int, radius: int, margin: int, dtype: DType) -> int:
    """Number of columns of a row, with margins and room for reads of whole vectors and strips beyond the end.

    It is an odd number of vectors: rows a power of two apart would map to few cache sets.
    """
    L = vector_lanes(dtype)
    window = in_strips(2 * radius + 1) + L  # as `load_window` reads it
    vectors = -(-(in_strips(W + 2 * margin, 2 * L) + window) // L)
    return (vectors + 1 - vectors % 2) * L


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of float32 or float64."""
    return torch.float64 if dtype == np.float64 else torch.float32


def array_of(tensor: Tensor, dtype: DType) -> Array:
    """A tensor as an array of this dtype, without a copy if possible."""
    array: Array = tensor.detach().to(torch_dtype(dtype)).numpy()
    return array


def channel_vectors(image: Tensor, dtype: DType) -> Array:
    """[B, C, H, W] -> [B, H, W, C in whole vectors], zeros beyond C; without a copy if it has this layout already."""
    array = array_of(image, dtype).transpose(0, 2, 3, 1)
    B, H, W, C = array.shape
    channels = in_strips(C, vector_lanes(dtype))
    if channels == C and array.flags.c_contiguous:
        return array
    vectors = aligned_empty((B, H, W, channels), dtype)
    vectors[..., :C], vectors[..., C:] = array, 0
    return vectors


def image_rows(images: Array, radius: int, margin: int, dtype: DType) -> Array:
    """[B, C, H, W] -> [B, H, C, `row_width`]: pixel 0 at column margin, radius pixels reflected, zeros beyond them."""
    B, C, H, W = images.shape
    rows = aligned_empty((B, H, C, row_width(W, radius, margin, dtype)), dtype)
    last = margin + W - 1

    def fill(job: tuple[int, int, int]) -> None:
        image, start, stop = job
        part = rows[image, start:stop]
        part[..., : margin - radius] = 0
        part[..., last + 1 + radius :] = 0
        part[..., margin : last + 1] = images[image, :, start:stop].transpose(1, 0, 2)
        part[..., margin - radius : margin] = part[..., margin + radius : margin : -1]
        part[..., last + 1 : last + 1 + radius] = part[..., last - 1 : last - 1 - radius : -1]

    in_threads(row_jobs(B, H, 64), lambda: fill, rows.size // 200_000)
    return rows


@inlined
def reflected(index: int, size: int) -> int:
    """Reflect an index up to size - 1 outside. Indices further outside, which are not used, map to any valid index."""
    return max(0, size - 1 - abs(size - 1 - abs(index)))


@compiled
def pack(kernel: Array, kernels: Array, y: int) -> None:
    """Convert a kernel [taps, H, W] to the given blocks, which are those of the pairs of rows y, y + 1, …"""
    T, _, W = kernel.shape
    pairs, blocks, L = kernels.shape[0], kernels.shape[1], lanes(kernel)
    for pair in range(pairs):
        for t in range(T):
            for side in range(2):
                Y = 2 * (y + pair) + side
                for block in range(W // L):
                    weights = without_denormals(load(kernel, (t, Y, block * L)))
                    store(kernels, (pair, block, t, side, 0), weights)
                for x in range(W - W % L, W):
                    weight = kernel[t, Y, x]
                    if kernel.itemsize == 4 and abs(weight) < TINY:
                        weight = weight * 0
                    kernels[pair, blocks - 1, t, side, x % L] = weight


@compiled
def unpack(kernels: Array, kernel: Array, y: int) -> None:
    """The inverse of `pack`; H may be odd."""
    T, H, W = kernel.shape
    pairs, blocks, L = kernels.shape[0], kernels.shape[1], lanes(kernel)
    for pair in range(pairs):
        for t in range(T):
            for side in range(min(2, H - 2 * (y + pair))):
                Y = 2 * (y + pair) + side
                for block in range(W // L):
                    store(kernel, (t, Y, block * L), load(kernels, (pair, block, t, side, 0)))
                for x in range(W - W % L, W):
                    kernel[t, Y, x] = kernels[pair, blocks - 1, t, side, x % L]
