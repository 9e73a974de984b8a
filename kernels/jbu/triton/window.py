"""Pieces of the Triton kernels that apply kernels: from taps to weights of the low-res window, to an upsampled tile.

Bicubic ×2, reflect padding and the n × n adaptive convolution are linear in the source: a pixel's kernel K folds into
weights Rᵀ·K·C of low-res pixels, with small matrices R and C for its row and column
(`kernels.jbu.triton.geometry.axis_tables`). The matrices also shift the weights, so that all pixels of a tile use the
same window of S low-res pixels, in one matrix product. There is no high-res source, and only the tables treat the
border specially.

About half of the weights are zeros, beyond a pixel's own neighbourhood. Hence a feature that is not finite affects all
pixels of the tiles whose window contains it. It is never lost, and stays in its image and channel.

Shapes and terms as in `kernels.jbu.triton.taps`.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.gpu.codes import quantize
from kernels.gpu.matrices import dot
from kernels.jbu.triton.taps import deep_dot

__all__ = ["load_tables", "taps_of_window_weights", "tile_places", "upsample_tile", "window_places", "window_weights"]


@triton.jit
def load_tables(
    rows, columns, y0, x0, H, W, row_kinds, column_kinds, down, across,
    AXIS: tl.constexpr, ACROSS: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load the tables of `kernels.jbu.triton.geometry.axis_tables` for the tile at (y0, x0).

    `down` and `across`, if not None, shift the window by this many low-res pixels; weights outside of the original
    window are 0.
    """
    PARTS: tl.constexpr = 16 // AXIS
    row, column = y0 // 4, x0 // (8 * ACROSS)
    row = tl.maximum(tl.minimum(row, row_kinds // 2), row - (tl.cdiv(H, 4) - row_kinds))
    column = tl.maximum(tl.minimum(column, column_kinds // 2), column - (tl.cdiv(W, 8 * ACROSS) - column_kinds))
    depth = tl.arange(0, 16)[None, :, None]
    y, place_y = row * 4 + tl.arange(0, 4)[:, None, None], tl.arange(0, WINDOW_ROWS * PARTS)[None, None, :]
    x, place_x = column * 8 * ACROSS + tl.arange(0, 8 * ACROSS), tl.arange(0, WINDOW_COLUMNS * PARTS)[None, None, :]
    rows += (y * 16 + depth) * (WINDOW_ROWS * PARTS) + place_y
    columns += (x[:, None, None] * 16 + depth) * (WINDOW_COLUMNS * PARTS) + place_x
    if down is None:
        row_table, column_table = tl.load(rows), tl.load(columns)
    else:
        y, x = place_y // PARTS + down, place_x % WINDOW_COLUMNS + across
        row_table = tl.load(rows + down * PARTS, (y >= 0) & (y < WINDOW_ROWS), 0.0)
        column_table = tl.load(columns + across, (x >= 0) & (x < WINDOW_COLUMNS), 0.0)
    return row_table, column_table


@triton.jit
def window_weights(
    kernel, rows, columns,
    AXIS: tl.constexpr, ACROSS: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute weights [P, S] of the tile's low-res window, in the kernel's dtype, with pixels row by row.

    The inputs are kernels [P, A·A] in patch order, and tables for the tile's rows [4, 16, window rows · parts] and
    columns [8·ACROSS, 16, parts · window columns].
    """
    A: tl.constexpr = AXIS
    PARTS: tl.constexpr = 16 // A
    X: tl.constexpr = 8 * ACROSS
    k = tl.reshape(kernel, [2, ACROSS, 2, 8, A, A // PARTS, PARTS])  # patch row and column, gy, gx, a, b, part of b
    k = tl.reshape(tl.permute(k, [0, 2, 1, 3, 5, 4, 6]), [4, X * (A // PARTS), 16])
    k = dot(k, rows, PRECISION).to(kernel.dtype)
    k = tl.reshape(
        k, [4, X, A // PARTS, WINDOW_ROWS // PARTS, PARTS, PARTS]
    )  # y, x, b, window row, its part, part of b
    k = tl.reshape(tl.permute(k, [1, 0, 3, 4, 2, 5]), [X, 4 * (WINDOW_ROWS // PARTS), 16])
    k = dot(k, columns, PRECISION).to(kernel.dtype)
    k = tl.permute(tl.reshape(k, [X, 4, WINDOW_ROWS * WINDOW_COLUMNS]), [1, 0, 2])
    return tl.reshape(k, [4 * X, WINDOW_ROWS * WINDOW_COLUMNS])


@triton.jit
def taps_of_window_weights(
    weights, rows, columns,
    AXIS: tl.constexpr, ACROSS: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The transpose of `window_weights`: from weights [P, S] to kernels [P, A·A] float32 in patch order."""
    A: tl.constexpr = AXIS
    PARTS: tl.constexpr = 16 // A
    X: tl.constexpr = 8 * ACROSS
    k = tl.permute(tl.reshape(weights, [4, X, WINDOW_ROWS * WINDOW_COLUMNS]), [1, 0, 2])
    k = tl.reshape(k, [X, 4 * (WINDOW_ROWS // PARTS), PARTS * WINDOW_COLUMNS])
    k = dot(k, tl.permute(columns, [0, 2, 1]), PRECISION).to(weights.dtype)
    k = tl.permute(tl.reshape(k, [X, 4, WINDOW_ROWS // PARTS, PARTS, A // PARTS, PARTS]), [1, 0, 4, 2, 3, 5])
    k = tl.reshape(k, [4, X * (A // PARTS), WINDOW_ROWS * PARTS])
    k = dot(k, tl.permute(rows, [0, 2, 1]), PRECISION)
    k = tl.permute(tl.reshape(k, [2, 2, ACROSS, 8, A // PARTS, A, PARTS]), [0, 2, 1, 3, 5, 4, 6])
    return tl.reshape(k, [4 * X, A * A])


@triton.jit
def window_places(
    y0, x0, h, w, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr
):  # fmt: skip
    """Offsets [S] of the low-res pixels in the window of the tile at (y0, x0), relative to (y0 // 2, x0 // 2).

    The edge is repeated.
    """
    place = tl.arange(0, WINDOW_ROWS * WINDOW_COLUMNS)
    y, x = y0 // 2, x0 // 2
    near_y = tl.minimum(tl.maximum(y - MARGIN + place // WINDOW_COLUMNS, 0), h - 1)
    near_x = tl.minimum(tl.maximum(x - MARGIN + place % WINDOW_COLUMNS, 0), w - 1)
    return (near_y - y) * w + (near_x - x)


@triton.jit
def tile_places(y0, x0, H, W, ACROSS: tl.constexpr):
    """Offsets [P] of the tile's pixels, row by row, relative to (y0, x0), and whether they are in the image."""
    pixel = tl.arange(0, 32 * ACROSS)
    y, x = pixel // (8 * ACROSS), pixel % (8 * ACROSS)
    return y * W + x, (y0 + y < H) & (x0 + x < W)


@triton.jit
def upsample_tile(
    weights, source, output, step, offset, not_finite, clipped, image, y0, x0, H, W, C,
    ACROSS: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
    C_BLOCK: tl.constexpr, CODES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply weights [P, S] with the tile's window of source [B, h, w, C].

    Writes the output [B, H, W, C]; or writes codes [B, C, H, W] and adds to the counts [B].
    """
    h, w = H // 2, W // 2
    source += ((image * h + y0 // 2) * w + x0 // 2) * C
    places = window_places(y0, x0, h, w, WINDOW_ROWS, WINDOW_COLUMNS, MARGIN) * C
    pixels, inside = tile_places(y0, x0, H, W, ACROSS)
    for start in range(0, C, C_BLOCK):
        channel = start + tl.arange(0, C_BLOCK)
        features = tl.load(source + places[:, None] + channel[None, :], (channel < C)[None, :], 0.0)
        features = deep_dot(weights, features, PRECISION)
        valid = inside[:, None] & (channel < C)[None, :]
        if CODES:
            scale = tl.load(step + channel, channel < C, 1.0)[None, :]
            shift = tl.load(offset + channel, channel < C, 0.0)[None, :]
            codes, infinite, beyond = quantize(features, scale, shift, valid, EXACT)
            tl.atomic_add(not_finite + image, infinite, infinite > 0, sem="relaxed")
            tl.atomic_add(clipped + image, beyond, beyond > 0, sem="relaxed")
            plane = output + image * C * H * W + y0.to(tl.int64) * W + x0 + channel.to(tl.int64) * H * W
            tl.store(plane[None, :] + pixels[:, None], codes, valid)
        else:
            there = output + ((image * H + y0) * W + x0) * C
            tl.store(there + (pixels * C)[:, None] + channel[None, :], features.to(output.dtype.element_ty), valid)
