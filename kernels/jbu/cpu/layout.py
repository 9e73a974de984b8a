"""How the compiled functions keep images and kernels in memory, and the way there and back.

Images come in rows with margins, [H, channels, `row_width`]: a pixel's neighbours in all channels lie near each other,
and reading past an edge needs no test. Kernels come in blocks of two rows × L columns of pixels, L as many as fill a
vector: [pairs of rows, blocks, `kernel_taps`, 2, L].
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

STRIP = 7  # taps computed at once; arrays over taps have room for whole strips, the last of which may hold anything


def in_strips(count: int, strip: int = STRIP) -> int:
    """Rounded up to whole strips."""
    return -(-count // strip) * strip


def kernel_taps(radius: int) -> int:
    """Room for a kernel's taps, in whole strips: of all, and of those in one of its rows."""
    n = 2 * radius + 1
    return max(in_strips(n * n), (n - 1) * n + in_strips(n))


def vector_lanes(dtype: DType) -> int:
    """Elements in a vector."""
    return VECTOR_BYTES // dtype.itemsize


def aligned_zeros(shape: tuple[int, ...], dtype: DType) -> Array:
    """As `numpy.zeros`, beginning where vectors do; torch's would wake torch's threads, which then wait for more."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + VECTOR_BYTES, np.uint8)
    start = -raw.ctypes.data % VECTOR_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_empty(shape: tuple[int, ...], dtype: DType) -> Array:
    """As `numpy.empty`, likewise. For what is large: torch gets the same memory again and again, already mapped."""
    array: Array = torch.empty(shape, dtype=torch_dtype(dtype)).numpy()
    return array


def kernel_blocks(pairs: int, W: int, radius: int, dtype: DType) -> Array:
    """Room for the kernels of so many pairs of rows."""
    L = vector_lanes(dtype)
    return aligned_zeros((pairs, in_strips(W, L) // L, kernel_taps(radius), 2, L), dtype)


def row_width(W: int, radius: int, margin: int, dtype: DType) -> int:
    """Columns of a row: its margins, and what whole vectors and strips read beyond.

    An odd number of vectors: rows a power of two apart would share few places in a cache.
    """
    L = vector_lanes(dtype)
    window = in_strips(2 * radius + 1) + L  # as `load_window` reads it
    vectors = -(-(in_strips(W + 2 * margin, 2 * L) + window) // L)
    return (vectors + 1 - vectors % 2) * L


def torch_dtype(dtype: DType) -> torch.dtype:
    """float32 or float64."""
    return torch.float64 if dtype == np.float64 else torch.float32


def array_of(tensor: Tensor, dtype: DType) -> Array:
    """A tensor as an array of another dtype, in its own memory if it can be."""
    array: Array = tensor.detach().to(torch_dtype(dtype)).numpy()
    return array


def channel_vectors(image: Tensor, dtype: DType) -> Array:
    """[B, C, H, W] -> [B, H, W, C in whole vectors], zeros beyond C; in its own memory if it is so already."""
    array = array_of(image, dtype).transpose(0, 2, 3, 1)
    B, H, W, C = array.shape
    channels = in_strips(C, vector_lanes(dtype))
    if channels == C and array.flags.c_contiguous:
        return array
    vectors = aligned_empty((B, H, W, channels), dtype)
    vectors[..., :C], vectors[..., C:] = array, 0
    return vectors


def image_rows(images: Array, radius: int, margin: int, dtype: DType) -> Array:
    """[B, C, H, W] -> [B, H, C, `row_width`]: pixel 0 at column margin, radius pixels reflected; zeros beyond them."""
    B, C, H, W = images.shape
    rows = aligned_empty((B, H, C, row_width(W, radius, margin, dtype)), dtype)
    last = margin + W - 1

    def fill(job: tuple[int, int, int]) -> None:
        image, start, stop = job
        some = rows[image, start:stop]
        some[..., : margin - radius] = 0
        some[..., last + 1 + radius :] = 0
        some[..., margin : last + 1] = images[image, :, start:stop].transpose(1, 0, 2)
        some[..., margin - radius : margin] = some[..., margin + radius : margin : -1]
        some[..., last + 1 : last + 1 + radius] = some[..., last - 1 : last - 1 - radius : -1]

    in_threads(row_jobs(B, H, 64), lambda: fill, rows.size // 200_000)
    return rows


@inlined
def reflected(index: int, size: int) -> int:
    """Where a pixel less than size outside lies; further outside, where nothing is used: at some pixel."""
    return max(0, size - 1 - abs(size - 1 - abs(index)))


@compiled
def pack(kernel: Array, kernels: Array, y: int) -> None:
    """A kernel [taps, H, W] -> blocks of the pairs of rows y, y + 1, …, as many as there is room for."""
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
    """The reverse of `pack`; H may be odd."""
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
