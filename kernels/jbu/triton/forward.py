"""The forward Triton kernel of joint bilateral upsampling: one kernel that composes the pieces for all operations."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.jbu.triton.taps import (
    corrected,
    load_kernel,
    program_tile,
    store_kernel,
    taps_of,
    unnormalised,
    window_distances,
    window_products,
)
from kernels.jbu.triton.window import load_tables, upsample_tile, window_weights

__all__ = ["run_tiles"]


@triton.jit
def run_tiles(
    kernel, kernel_b, kernel_c, kernel_y, kernel_x,  # [B, n*n, H, W], given or the output
    guidance, guidance_b, guidance_c, guidance_y, guidance_x,  # [B, G, H, W]
    slide_rows, slide_columns,  # slide_tables, unless the kernel is given
    spatial, range_factor,  # base-2 logarithm of the spatial Gaussian [16, U] float32; that of the range, a number
    keys, weights, bias, factor,  # [B, H, W, KEY_DIM] and the rest of `kernels.jbu.triton.learned.Prepared`
    source, rows, columns, row_kinds, column_kinds,  # [B, h, w, C] and its `axis_tables`
    output, step, offset, not_finite, clipped,  # [B, H, W, C]; or codes [B, C, H, W], with [C], [C], [B], [B]
    H, W, C,
    KERNEL: tl.constexpr, OUTPUT: tl.constexpr, KEY_DIM: tl.constexpr, GUIDANCE_DIM: tl.constexpr,
    GUIDANCE_ROWS: tl.constexpr, HIDDEN: tl.constexpr, FIXUP_WEIGHT: tl.constexpr, C_BLOCK: tl.constexpr,
    EXACT: tl.constexpr, KERNEL_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """A tile, from `KERNEL` ("given", "products", "bilateral", "learned") to `OUTPUT` ("kernel", "features", "codes").

    Arguments that a combination does not use are None.
    """
    image, y0, x0 = program_tile(ACROSS)

    if KERNEL == "given":
        kernel += image * kernel_b
        taps = load_kernel(kernel, kernel_c, kernel_y, kernel_x, y0, x0, H, W, RADIUS, AXIS, ACROSS)
    else:
        place = tl.arange(0, 16)[:, None] * (AXIS * KEY_COLUMNS) + tl.arange(0, AXIS * KEY_COLUMNS)[None, :]
        if KERNEL == "bilateral":
            distances = window_distances(
                guidance + image * guidance_b, guidance_c, guidance_y, guidance_x, y0, x0, H, W,
                GUIDANCE_DIM, RADIUS, AXIS, ACROSS, KEY_COLUMNS,
            )  # fmt: skip
            near = tl.exp2(distances * range_factor + tl.load(spatial + place)[None])
            near = near.to((kernel if OUTPUT == "kernel" else source).dtype.element_ty)
        else:
            near = window_products(
                keys + image * H * W * KEY_DIM, y0, x0, H, W,
                KEY_DIM, RADIUS, AXIS, ACROSS, KEY_COLUMNS, KERNEL_PRECISION,
            )  # fmt: skip
            gaussian = tl.load(spatial + place)[None]
            if KERNEL == "learned":
                near, least = unnormalised(near, tl.load(factor), gaussian, tl.load(spatial))
            else:  # beyond the radius, products may overflow
                near = tl.where(gaussian > float("-inf"), near, 0.0)
            near = near.to(keys.dtype.element_ty)
        taps = taps_of(near, slide_rows, slide_columns, AXIS, ACROSS, KEY_COLUMNS, KERNEL_PRECISION)
        if KERNEL == "bilateral":
            taps *= 1.0 / tl.sum(taps, 1, keep_dims=True)  # the sum is at least 1, the pixel's own weight
        if KERNEL == "learned":
            taps *= 1.0 / tl.maximum(tl.sum(taps, 1, keep_dims=True), tl.reshape(least, [32 * ACROSS, 1]))
        if KERNEL == "learned":
            taps = corrected(
                taps, guidance + image * guidance_b, guidance_c, guidance_y, guidance_x, y0, x0, H, W, weights, bias,
                GUIDANCE_DIM, GUIDANCE_ROWS, HIDDEN, FIXUP_WEIGHT, AXIS, ACROSS, EXACT, KERNEL_PRECISION,
            )  # fmt: skip

    if OUTPUT == "kernel":
        kernel += image * kernel_b
        store_kernel(taps, kernel, kernel_c, kernel_y, kernel_x, y0, x0, H, W, RADIUS, AXIS, ACROSS)
    else:
        down, across = load_tables(
            rows, columns, y0, x0, H, W, row_kinds, column_kinds, None, None,
            AXIS, ACROSS, WINDOW_ROWS, WINDOW_COLUMNS,
        )  # fmt: skip
        taps = taps.to(source.dtype.element_ty)
        upsample_tile(
            window_weights(taps, down, across, AXIS, ACROSS, WINDOW_ROWS, WINDOW_COLUMNS, PRECISION),
            source, output, step, offset, not_finite, clipped, image, y0, x0, H, W, C,
            ACROSS, WINDOW_ROWS, WINDOW_COLUMNS, MARGIN, C_BLOCK, OUTPUT == "codes", EXACT, PRECISION,
        )  # fmt: skip
