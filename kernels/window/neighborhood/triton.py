"""Neighbourhood attention across scales on NVIDIA GPUs, in Triton: one launch for the whole batch, without gradients.

A program computes a tile of pixels of one cell, which share their window: for every head, scores of the window's keys
and a softmax by blocks, as in FlashAttention, then the product with the values. Keys and values are never upsampled,
and weights stay on the chip. Products use the matrix units: half-precision operands for half inputs, three tf32
products for float32; sums are float32. There are no floating-point atomics, so results are reproducible, and do not
depend on the rest of the batch.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Kind
from kernels.gpu.cache import ensure_cache
from kernels.gpu.codes import quantize
from kernels.gpu.matrices import dot, precision
from kernels.gpu.requirements import not_for_triton
from kernels.quantization import Codes, Quantization

__all__ = ["FORWARD_MODE", "neighborhood_attention", "neighborhood_codes", "reasons_not"]

FORWARD_MODE = False

_PIXELS = 64  # of a tile; 196 take four tiles
_MOST_CHANNELS = 64  # of the output per program
_MOST_IMAGES = 65535  # along an axis of the grid


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why this implementation cannot take inputs of these kinds; none if it can."""
    return not_for_triton(kinds)


def neighborhood_attention(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool) -> Tensor:
    """As `kernels.window.neighborhood.neighborhood_attention`, which has checked the arguments; channels_last."""
    B, H, W, heads, _ = queries.shape
    channels = values.shape[1] // heads if sum_heads else values.shape[1]
    output = values.new_empty(B, H, W, channels)
    _run(queries, keys, values, window, sum_heads, output=output)
    return output.permute(0, 3, 1, 2)


def neighborhood_codes(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, quantization: Quantization
) -> Codes:
    """As `kernels.window.neighborhood.neighborhood_codes`, which has checked the arguments."""
    B, H, W, heads, _ = queries.shape
    channels = values.shape[1] // heads if sum_heads else values.shape[1]
    not_finite, clipped = (torch.zeros(B, dtype=torch.int32, device=values.device) for _ in range(2))
    codes = Codes(values.new_empty(B, channels, H, W, dtype=torch.int8), not_finite, clipped)
    # float32 features are divided, as in the reference; for half features, a product is accurate enough.
    step = quantization.step if values.dtype == torch.float32 else quantization.step.reciprocal()
    scale = {"step": step.contiguous(), "offset": quantization.offset.contiguous()}
    counts = {"not_finite": not_finite, "clipped": clipped}
    _run(queries, keys, values, window, sum_heads, output=codes.codes, **scale, **counts)
    return codes


def _run(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, **arguments: Any) -> None:
    launch(_attend, *geometry(queries, keys, values, window, sum_heads), **arguments)


def geometry(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid of programs, and the arguments that all outputs share.

    Raises:
        ValueError: the batch is too large for one launch.
    """
    (B, H, W, heads, d), (h, w) = queries.shape, keys.shape[1:3]
    if B > _MOST_IMAGES:
        raise ValueError(f"queries: got {B} images, need at most {_MOST_IMAGES} in one call. Split the batch.")
    c = values.shape[1] // heads
    pixels = (H // h) * (W // w)
    block = min(_MOST_CHANNELS, max(16, triton.next_power_of_2(c)))
    size = min(_PIXELS, max(16, triton.next_power_of_2(pixels)))
    grid = (h * w * triton.cdiv(pixels, size), triton.cdiv(c, block) * (1 if sum_heads else heads), B)
    return grid, {
        "queries": queries.contiguous(),
        "keys": keys.contiguous(),
        "values": values.permute(0, 2, 3, 1).contiguous(),
        "H": H,
        "W": W,
        "h": h,
        "w": w,
        "c": c,
        "factor": math.log2(math.e) / math.sqrt(d),
        "HEADS": heads,
        "D": d,
        "D_BLOCK": max(16, triton.next_power_of_2(d)),
        "C_BLOCK": block,
        "PIXELS": size,
        "TAPS": 16 if queries.dtype == torch.float32 else 32,
        "ROWS": min(window, h),
        "COLUMNS": min(window, w),
        "REACH": window // 2,
        "SUM_HEADS": sum_heads,
        "EXACT": values.dtype == torch.float32,
        "PRECISION": precision(queries.dtype, values.dtype),
    }


def launch(kernel: Any, grid: tuple[int, ...], shared: dict[str, Any], **arguments: Any) -> None:
    """Launch a kernel with the arguments of `geometry` and those of one kind of output; others are None."""
    ensure_cache()
    with torch.cuda.device_of(shared["queries"]):  # Triton launches on the current device
        kernel[grid](**complete(shared, arguments), **options())


def complete(shared: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the kernel."""
    unused = dict.fromkeys(("step", "offset", "not_finite", "clipped"))
    return shared | unused | arguments | {"CODES": "step" in arguments}


def options() -> dict[str, Any]:
    """Compilation options. They were chosen by the output of ptxas, not by timings: no dtype spills registers."""
    return {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def _attend(
    queries, keys, values,  # [B, H, W, HEADS, D], [B, h, w, HEADS, D], [B, h, w, HEADS, c]
    output, step, offset, not_finite, clipped,  # [B, H, W, C]; or codes [B, C, H, W], with [C], [C], [B], [B]
    H, W, h, w, c, factor,  # factor: on products of queries and keys, for base 2
    HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr, SUM_HEADS: tl.constexpr,
    CODES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of pixels of a cell, for a block of channels of one head, or of the sum of all heads."""
    image = tl.program_id(2).to(tl.int64)
    down, across = H // h, W // w
    tiles = tl.cdiv(down * across, PIXELS)
    cell, first = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * PIXELS
    i, j = cell // w, cell % w
    blocks = tl.cdiv(c, C_BLOCK)
    channel = (tl.program_id(1) % blocks) * C_BLOCK + tl.arange(0, C_BLOCK)
    head = tl.program_id(1) // blocks  # 0 for the sum

    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < down * across
    place = (i * down + pixel // across) * W + j * across + pixel % across
    queries += image * H * W * (HEADS * D) + place.to(tl.int64)[:, None] * (HEADS * D)
    top = tl.minimum(tl.maximum(i - REACH, 0), h - ROWS)
    left = tl.minimum(tl.maximum(j - REACH, 0), w - COLUMNS)
    keys += (image * h * w + top * w + left) * (HEADS * D)
    values += (image * h * w + top * w + left) * HEADS * c

    features = tl.zeros([PIXELS, C_BLOCK], tl.float32)
    for turn in range(HEADS if SUM_HEADS else 1):
        of_head = head + turn
        features += _attention(
            queries + of_head * D, keys + of_head * D, values + of_head * c, inside, channel, w, c, factor,
            HEADS, D, D_BLOCK, C_BLOCK, PIXELS, TAPS, ROWS, COLUMNS, PRECISION,
        )  # fmt: skip

    C = c if SUM_HEADS else c * HEADS
    valid = inside[:, None] & (channel < c)[None, :]
    channel += head * c
    if CODES:
        scale = tl.load(step + channel, channel < C, 1.0)[None, :]
        shift = tl.load(offset + channel, channel < C, 0.0)[None, :]
        codes, infinite, beyond = quantize(features, scale, shift, valid, EXACT)
        tl.atomic_add(not_finite + image, infinite, infinite > 0, sem="relaxed")
        tl.atomic_add(clipped + image, beyond, beyond > 0, sem="relaxed")
        output += image * C * H * W
        tl.store(output + (channel.to(tl.int64) * H * W)[None, :] + place[:, None], codes, valid)
    else:
        output += image * H * W * C
        there = output + place.to(tl.int64)[:, None] * C + channel[None, :]
        tl.store(there, features.to(output.dtype.element_ty), valid)


@triton.jit
def _attention(
    queries, keys, values, inside, channel, w, c, factor,
    HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one head: [PIXELS, C_BLOCK] float32.

    Args:
        queries: pointers to the first channel of each pixel's query [PIXELS, 1].
        keys: pointer to the first channel of the window's first key; values alike.
    """
    depth = tl.arange(0, D_BLOCK)
    query = tl.load(queries + depth[None, :], inside[:, None] & (depth < D)[None, :], 0.0)
    largest = tl.full([PIXELS], float("-inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    sums = tl.zeros([PIXELS, C_BLOCK], tl.float32)
    for start in range(0, ROWS * COLUMNS, TAPS):
        tap = start + tl.arange(0, TAPS)
        near = tap < ROWS * COLUMNS
        seen = ((tap // COLUMNS) * w + tap % COLUMNS) * HEADS
        key = tl.load(keys + (seen * D)[None, :] + depth[:, None], near[None, :] & (depth < D)[:, None], 0.0)
        scores = tl.where(near[None, :], dot(query, key, PRECISION) * factor, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - most[:, None]), tl.exp2(largest - most)
        value = tl.load(values + (seen * c)[:, None] + channel[None, :], near[:, None] & (channel < c)[None, :], 0.0)
        sums = dot(weights.to(value.dtype), value, PRECISION, sums * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = most
    return sums / total[:, None]
