"""Gradients of the Triton kernels of joint bilateral upsampling, without atomics: one program sums each value."""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.matrices import dot, precision
from kernels.jbu.triton.geometry import Geometry, axis_tables
from kernels.jbu.triton.launching import by_pixel, channel_block, launch, padded, padded_keys, strides
from kernels.jbu.triton.taps import load_kernel, program_tile, reflected, store_kernel
from kernels.jbu.triton.window import (
    load_tables,
    taps_of_window_weights,
    tile_places,
    window_places,
    window_weights,
)

__all__ = ["adaptive_conv_upsample2x_backward", "range_products_backward"]


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
    geometry = Geometry(math.isqrt(kernel.shape[1]) // 2)
    C, h, w = source.shape[1:]
    rows, columns = axis_tables(geometry, h, w, source.dtype, source.device)
    arguments = {"gradient": by_pixel(gradient), "rows": rows, "columns": columns, "C": C, "H": 2 * h, "W": 2 * w}
    arguments |= {"row_kinds": rows.shape[0], "column_kinds": columns.shape[0], "PRECISION": precision(source.dtype)}
    of_source = _source_gradient(geometry, source, kernel, arguments) if for_source else None
    of_kernel = _kernel_gradient(geometry, source, kernel, arguments) if for_kernel else None
    return of_source, of_kernel


def _kernel_gradient(geometry: Geometry, source: Tensor, kernel: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = kernel.new_empty(kernel.shape)
    launch(
        _kernel_gradient_tiles, geometry.grid(kernel.shape[0], *kernel.shape[2:]), geometry, source.dtype,
        source=by_pixel(source), **strides("output", output), C_BLOCK=channel_block(source.shape[1], source.dtype),
        **arguments,
    )  # fmt: skip
    return output


def _source_gradient(geometry: Geometry, source: Tensor, kernel: Tensor, arguments: dict[str, Any]) -> Tensor:
    B, C, h, w = source.shape
    margin, (rows, columns) = geometry.margin, geometry.window
    sums = torch.empty(B, h + 2 * margin, w + 2 * margin, C, dtype=torch.float32, device=source.device)
    block = min(channel_block(C, source.dtype), 64)  # all low-res pixels of a window are summed at once
    blocks = triton.cdiv(w + 2 * margin, columns), triton.cdiv(h + 2 * margin, rows)
    launch(
        _source_gradient_tiles, (triton.cdiv(C, block) * blocks[0], blocks[1], B), geometry, source.dtype,
        **strides("kernel", kernel), sums=sums, C_BLOCK=block, **arguments,
    )  # fmt: skip
    for axis in (1, 2):  # pixels beyond the edge repeat the edge, so their gradients belong to it
        before, inside, after = sums.split([margin, sums.shape[axis] - 2 * margin, margin], axis)
        inside.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
        inside.narrow(axis, inside.shape[axis] - 1, 1).add_(after.sum(axis, keepdim=True))
        sums = inside
    return sums.permute(0, 3, 1, 2).to(source.dtype).contiguous()


def range_products_backward(gradient: Tensor, keys: Tensor, radius: int) -> Tensor:
    """Gradient of `range_products`: gradient [B, n*n, H, W], keys [B, D, H, W] -> [B, D, H, W], contiguous."""
    geometry = Geometry(radius)
    B, D, H, W = keys.shape
    keys_by_pixel = padded_keys(keys)
    sums = torch.empty(B, H + 2 * radius, W + 2 * radius, padded(D), dtype=torch.float32, device=keys.device)
    launch(
        _keys_gradient_tiles, geometry.grid(B, H + 2 * radius, W + 2 * radius), geometry, keys.dtype,
        **strides("gradient", gradient), keys=keys_by_pixel, sums=sums, H=H, W=W,
        KEY_DIM=padded(D), PRECISION=precision(keys.dtype),
    )  # fmt: skip
    for axis in (1, 2):  # pixels beyond the border are reflections, so their gradients belong to the reflected pixels
        size = sums.shape[axis] - 2 * radius
        before, inside, after = sums.split([radius, size, radius], axis)
        inside.narrow(axis, 1, radius).add_(before.flip(axis))
        inside.narrow(axis, size - 1 - radius, radius).add_(after.flip(axis))
        sums = inside
    return sums[..., :D].permute(0, 3, 1, 2).to(keys.dtype).contiguous()


@triton.jit
def _kernel_gradient_tiles(
    gradient, source, rows, columns, row_kinds, column_kinds,  # [B, H, W, C], [B, h, w, C], axis_tables
    output, output_b, output_c, output_y, output_x, H, W, C,  # [B, n*n, H, W]
    C_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """Compute gradients of a tile's window weights, and fold them back to taps."""
    image, y0, x0 = program_tile(ACROSS)
    places = window_places(y0, x0, H // 2, W // 2, WINDOW_ROWS, WINDOW_COLUMNS, MARGIN)
    source += ((image * (H // 2) + y0 // 2) * (W // 2) + x0 // 2) * C
    pixels, inside = tile_places(y0, x0, H, W, ACROSS)
    gradient += ((image * H + y0) * W + x0) * C
    sums = tl.zeros([32 * ACROSS, WINDOW_ROWS * WINDOW_COLUMNS], tl.float32)
    for start in range(0, C, C_BLOCK):
        channel = start + tl.arange(0, C_BLOCK)
        outer = tl.load(
            gradient + (pixels * C)[:, None] + channel[None, :], inside[:, None] & (channel < C)[None, :], 0.0
        )
        features = tl.load(source + (places * C)[:, None] + channel[None, :], (channel < C)[None, :], 0.0)
        sums = dot(outer, tl.trans(features), PRECISION, sums)
    row_table, column_table = load_tables(
        rows, columns, y0, x0, H, W, row_kinds, column_kinds, None, None, AXIS, ACROSS, WINDOW_ROWS, WINDOW_COLUMNS
    )  # fmt: skip
    taps = taps_of_window_weights(
        sums.to(source.dtype.element_ty), row_table, column_table,
        AXIS, ACROSS, WINDOW_ROWS, WINDOW_COLUMNS, PRECISION,
    )  # fmt: skip
    store_kernel(
        taps, output + image * output_b, output_c, output_y, output_x, y0, x0, H, W, RADIUS, AXIS, ACROSS
    )  # fmt: skip


@triton.jit
def _source_gradient_tiles(
    gradient, kernel, kernel_b, kernel_c, kernel_y, kernel_x,  # [B, H, W, C], [B, n*n, H, W]
    rows, columns, row_kinds, column_kinds, sums, H, W, C,  # [B, h + 2*MARGIN, w + 2*MARGIN, C] float32
    C_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """Compute gradients of a block of low-res pixels of the size of a window, from all tiles whose window overlaps it.

    Low-res pixels are numbered from the first pixel of the margin, because windows begin in the margin.
    """
    LOW_COLUMNS: tl.constexpr = 4 * ACROSS  # low-res columns of a tile, without margins
    height, width = H // 2 + 2 * MARGIN, W // 2 + 2 * MARGIN
    C_BLOCKS = tl.cdiv(C, C_BLOCK)
    channel = tl.program_id(0) % C_BLOCKS * C_BLOCK + tl.arange(0, C_BLOCK)
    left, top = tl.program_id(0) // C_BLOCKS * WINDOW_COLUMNS, tl.program_id(1) * WINDOW_ROWS
    image = tl.program_id(2).to(tl.int64)
    kernel += image * kernel_b
    total = tl.zeros([WINDOW_ROWS * WINDOW_COLUMNS, C_BLOCK], tl.float32)
    # The window of tile row i has low-res rows 2i … 2i + 1 + 2*MARGIN; columns are analogous.
    DOWN: tl.constexpr = WINDOW_ROWS // 2 + MARGIN
    ACROSS_: tl.constexpr = WINDOW_COLUMNS // LOW_COLUMNS + (2 * MARGIN + LOW_COLUMNS - 1) // LOW_COLUMNS
    for number in range(DOWN * ACROSS_):
        row = (top + WINDOW_ROWS) // 2 - DOWN + number // ACROSS_
        column = (left + WINDOW_COLUMNS) // LOW_COLUMNS - ACROSS_ + number % ACROSS_
        y0, x0 = row * 4, column * 8 * ACROSS
        if (row >= 0) & (column >= 0) & (y0 < H) & (x0 < W):
            row_table, column_table = load_tables(
                rows, columns, y0, x0, H, W, row_kinds, column_kinds, top - row * 2, left - column * LOW_COLUMNS,
                AXIS, ACROSS, WINDOW_ROWS, WINDOW_COLUMNS,
            )  # fmt: skip
            taps = load_kernel(kernel, kernel_c, kernel_y, kernel_x, y0, x0, H, W, RADIUS, AXIS, ACROSS)
            weights = window_weights(
                taps, row_table, column_table, AXIS, ACROSS, WINDOW_ROWS, WINDOW_COLUMNS, PRECISION
            )  # fmt: skip
            pixels, inside = tile_places(y0, x0, H, W, ACROSS)
            here = gradient + ((image * H + y0) * W + x0) * C + (pixels * C)[:, None] + channel[None, :]
            outer = tl.load(here, inside[:, None] & (channel < C)[None, :], 0.0)
            total = dot(tl.trans(weights), outer, PRECISION, total)
    place = tl.arange(0, WINDOW_ROWS * WINDOW_COLUMNS)
    y, x = place // WINDOW_COLUMNS, place % WINDOW_COLUMNS
    valid = ((top + y < height) & (left + x < width))[:, None] & (channel < C)[None, :]
    sums += ((image * height + top) * width + left) * C
    tl.store(sums + ((y * width + x) * C)[:, None] + channel[None, :], total, valid)


@triton.jit
def _keys_gradient_tiles(
    gradient, gradient_b, gradient_c, gradient_y, gradient_x,  # [B, n*n, H, W]
    keys, sums, H, W,  # [B, H, W, KEY_DIM], [B, H + 2*RADIUS, W + 2*RADIUS, KEY_DIM] float32
    KEY_DIM: tl.constexpr, PRECISION: tl.constexpr,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """Compute gradients of a tile of keys; keys beyond the border are separate from the pixels that they reflect.

    A key is a factor of products both as centre and as neighbour; beyond the border, only as neighbour.
    """
    image, y0, x0 = program_tile(ACROSS)
    y0, x0 = y0 - RADIUS, x0 - RADIUS
    gradient += image * gradient_b
    keys += image * H * W * KEY_DIM
    patch, pixel, channel = tl.arange(0, 2 * ACROSS), tl.arange(0, 16), tl.arange(0, KEY_DIM)[None, None, :]
    top, left = y0 + 2 * (patch // ACROSS), x0 + 8 * (patch % ACROSS)
    y, x = (top[:, None] + (pixel // 8)[None, :])[:, :, None], (left[:, None] + (pixel % 8)[None, :])[:, :, None]
    here = y.to(tl.int64) * gradient_y + x.to(tl.int64) * gradient_x
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    total = tl.zeros([2 * ACROSS, 16, KEY_DIM], tl.float32)
    BLOCK: tl.constexpr = 128 if AXIS * KEY_COLUMNS > 128 else AXIS * KEY_COLUMNS
    for start in tl.range(0, AXIS * KEY_COLUMNS, BLOCK, num_stages=1):
        place = start + tl.arange(0, BLOCK)
        near_y = top[:, None] + (place // KEY_COLUMNS)[None, :] - RADIUS
        near_x = left[:, None] + (place % KEY_COLUMNS)[None, :] - RADIUS
        down, across = near_y[:, None, :] - y, near_x[:, None, :] - x
        close = (tl.abs(down) <= RADIUS) & (tl.abs(across) <= RADIUS)
        tap = ((down + RADIUS) * (2 * RADIUS + 1) + across + RADIUS).to(tl.int64)
        weights = tl.load(gradient + here + tap * gradient_c, inside & close, 0.0).to(tl.float32)
        opposite = (2 * RADIUS + 1) * (2 * RADIUS + 1) - 1 - tap
        there = (near_y.to(tl.int64) * gradient_y + near_x.to(tl.int64) * gradient_x)[:, None, :]
        near_inside = ((near_y >= 0) & (near_y < H) & (near_x >= 0) & (near_x < W))[:, None, :]
        weights += tl.load(gradient + there + opposite * gradient_c, near_inside & close, 0.0).to(tl.float32)
        near = (reflected(near_y, H).to(tl.int64) * W + reflected(near_x, W)) * KEY_DIM
        window = tl.load(keys + near[:, :, None] + channel)
        total = dot(weights.to(window.dtype), window, PRECISION, total)
    width = W + 2 * RADIUS
    sums += (image * (H + 2 * RADIUS) + y0 + RADIUS) * width * KEY_DIM
    places = ((y - y0) * width + x + RADIUS) * KEY_DIM
    tl.store(sums + places + channel, total, (y < H + RADIUS) & (x < W + RADIUS))
