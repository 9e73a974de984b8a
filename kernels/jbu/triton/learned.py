"""Prepare a learned stage for the Triton kernel in one launch: every pixel's key, and parameters as matrices.

Without this, the program of a tile would recompute a pixel's key for every patch whose window contains it: 8 times as
many keys.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.matrices import dot, precision
from kernels.jbu.parameters import StageParameters
from kernels.jbu.triton.geometry import Geometry, power_of_two, squared_distances
from kernels.jbu.triton.launching import launch, padded, strides
from kernels.jbu.triton.taps import gelu

__all__ = ["Prepared", "guidance_rows", "prepare"]

_LOG2_E = tl.constexpr(math.log2(math.e))
_PIXELS = 128  # pixels per program that computes keys
_PACKED = 1024  # elements per program that packs parameters


class Prepared(NamedTuple):
    """A learned stage as `kernels.jbu.triton.forward.run_tiles` reads it.

    Attributes:
        keys: [B, H, W, D], with D padded with zeros to a power of two; dtype of the guidance.
        weights: weights of the correction, concatenated: for guidance and bias [guidance rows, hidden], for taps [A·A,
            hidden], and of the second layer [hidden, A·A]; padded with zeros; dtype of the guidance.
        spatial: [16, U] float32, base-2 logarithm of the spatial Gaussian from a patch's pixels to its window's; −∞
            beyond the radius. The first element is the smallest within the radius.
        bias: [A·A] float32, bias of the second layer.
        factor: [1] float32, factor from key products to base-2 exponents.
    """

    keys: Tensor
    weights: Tensor
    spatial: Tensor
    bias: Tensor
    factor: Tensor


def prepare(guidance: Tensor, stage: StageParameters, geometry: Geometry, result: torch.dtype) -> Prepared:
    """Compute keys and pack parameters.

    Args:
        guidance: [B, G, H, W].
        stage: parameters, in the guidance's dtype.
        geometry: geometry of the stage's radius.
        result: dtype of the final result.
    """
    B, G, H, W = guidance.shape
    taps, rows, D = geometry.axis**2, guidance_rows(G), stage.key_bias0.numel()
    single = torch.empty(16 * geometry.neighbours + taps + 1, dtype=torch.float32, device=guidance.device)
    weights = guidance.new_empty((rows + 2 * taps) * geometry.hidden)
    keys = guidance.new_empty(B, H, W, padded(D))
    image_blocks = triton.cdiv(H * W, _PIXELS)
    packed_blocks = triton.cdiv(max(weights.numel(), single.numel()), _PACKED)
    launch(
        _prepare, (B * image_blocks + packed_blocks,), geometry, guidance.dtype,
        **strides("guidance", guidance), **{name: tensor.contiguous() for name, tensor in stage._asdict().items()},
        distances=squared_distances(geometry, guidance.device), keys=keys, weights=weights, single=single, H=H, W=W,
        image_blocks=image_blocks, packed_blocks=packed_blocks, G=G, D=D, KEY_DIM=padded(D), GUIDANCE_ROWS=rows,
        HIDDEN=geometry.hidden, EXACT=result == torch.float32, PRECISION=precision(guidance.dtype, result),
        PIXELS=_PIXELS, PACKED=_PACKED,
    )  # fmt: skip
    spatial, bias, factor = single.split([16 * geometry.neighbours, taps, 1])
    return Prepared(keys, weights, spatial, bias, factor)


def guidance_rows(channels: int) -> int:
    """Rows of the guidance's weights, including one for the bias; padded."""
    return max(16, power_of_two(channels + 1))


@triton.jit
def _prepare(
    guidance, guidance_b, guidance_c, guidance_y, guidance_x,
    range_temp, sigma_spatial, key_weight0, key_bias0, key_weight1, key_bias1,
    fixup_weight0, fixup_bias0, fixup_weight1, fixup_bias1,
    distances, keys, weights, single, H, W, image_blocks, packed_blocks,
    G: tl.constexpr, D: tl.constexpr, KEY_DIM: tl.constexpr, GUIDANCE_ROWS: tl.constexpr, HIDDEN: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr, PACKED: tl.constexpr,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < packed_blocks:
        i = program * PACKED + tl.arange(0, PACKED)
        _pack_weights(i, fixup_weight0, fixup_bias0, fixup_weight1, weights, G, GUIDANCE_ROWS, HIDDEN, RADIUS, AXIS)
        _pack_single(i, range_temp, sigma_spatial, fixup_bias1, distances, single, RADIUS, AXIS, AXIS * KEY_COLUMNS)
    else:
        block = program - packed_blocks
        image = (block // image_blocks).to(tl.int64)
        pixel = block % image_blocks * PIXELS + tl.arange(0, PIXELS)
        places = (pixel // W).to(tl.int64) * guidance_y + (pixel % W).to(tl.int64) * guidance_x + image * guidance_b
        g, d, e = tl.arange(0, GUIDANCE_ROWS), tl.arange(0, KEY_DIM), tl.arange(0, KEY_DIM)
        valid = (pixel < H * W)[:, None] & (g < G)[None, :]
        colour = tl.load(guidance + places[:, None] + g.to(tl.int64)[None, :] * guidance_c, valid, 0.0)
        weight = tl.load(key_weight0 + d[None, :] * G + g[:, None], (d < D)[None, :] & (g < G)[:, None], 0.0)
        hidden = dot(colour, weight, PRECISION) + tl.load(key_bias0 + d, d < D, 0.0)[None, :]
        hidden = gelu(hidden, EXACT).to(colour.dtype)
        weight = tl.load(key_weight1 + e[None, :] * D + d[:, None], (e < D)[None, :] & (d < D)[:, None], 0.0)
        key = dot(hidden, weight, PRECISION) + tl.load(key_bias1 + e, e < D, 0.0)[None, :]
        places = (image * H * W + pixel)[:, None] * KEY_DIM + e[None, :]
        tl.store(keys + places, key.to(colour.dtype), (pixel < H * W)[:, None])


@triton.jit
def _pack_weights(
    i, fixup_weight0, fixup_bias0, fixup_weight1, weights,
    G: tl.constexpr, GUIDANCE_ROWS: tl.constexpr, HIDDEN: tl.constexpr, RADIUS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Write elements i of `Prepared.weights`: each comes from one of four tensors or is padding, 0."""
    WIDTH: tl.constexpr = 2 * RADIUS + 1
    REAL: tl.constexpr = WIDTH * WIDTH
    TAPS: tl.constexpr = AXIS * AXIS
    row, column = i // HIDDEN, i % HIDDEN
    value = tl.load(fixup_weight0 + column * (REAL + G) + REAL + row, (row < G) & (column < REAL), 0.0).to(tl.float32)
    value += tl.load(fixup_bias0 + column, (row == G) & (column < REAL), 0.0).to(tl.float32)
    a, b = (row - GUIDANCE_ROWS) // AXIS, (row - GUIDANCE_ROWS) % AXIS
    valid = (row >= GUIDANCE_ROWS) & (a < WIDTH) & (b < WIDTH) & (column < REAL)
    value += tl.load(fixup_weight0 + column * (REAL + G) + a * WIDTH + b, valid, 0.0).to(tl.float32)
    j = i - (GUIDANCE_ROWS + TAPS) * HIDDEN
    row, a, b = j // TAPS, j % TAPS // AXIS, j % AXIS
    valid = (j >= 0) & (row < REAL) & (a < WIDTH) & (b < WIDTH)
    value += tl.load(fixup_weight1 + (a * WIDTH + b) * REAL + row, valid, 0.0).to(tl.float32)
    tl.store(weights + i, value, j < HIDDEN * TAPS)


@triton.jit
def _pack_single(
    i, range_temp, sigma_spatial, fixup_bias1, distances, single,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Write elements i of the concatenated `Prepared.spatial`, `bias` and `factor`."""
    SPATIAL: tl.constexpr = 16 * NEIGHBOURS
    WIDTH: tl.constexpr = 2 * RADIUS + 1
    TAPS: tl.constexpr = AXIS * AXIS
    sigma = tl.load(sigma_spatial).to(tl.float32) * RADIUS
    squared = tl.load(distances + i, i < SPATIAL, -1.0)
    spatial = tl.where(squared < 0, float("-inf"), -squared / (2.0 * sigma * sigma) * _LOG2_E)
    a, b = (i - SPATIAL) // AXIS, (i - SPATIAL) % AXIS
    bias = tl.load(fixup_bias1 + a * WIDTH + b, (i >= SPATIAL) & (a < WIDTH) & (b < WIDTH), 0.0).to(tl.float32)
    temperature = tl.exp2(tl.load(range_temp).to(tl.float32) * _LOG2_E)
    factor = tl.clamp(temperature, 1e-4, 1e4, propagate_nan=tl.PropagateNan.ALL) * _LOG2_E
    value = tl.where(i < SPATIAL, spatial, tl.where(i < SPATIAL + TAPS, bias, factor))
    tl.store(single + i, value, i <= SPATIAL + TAPS)
