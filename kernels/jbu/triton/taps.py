"""Pieces of the Triton kernels that compute kernels: from keys or guidance to the taps of every pixel of a tile.

Each pixel has its own neighbourhood, but matrix units need operands that pixels share. So 16 pixels (a patch of 2 × 8)
are multiplied with all keys of the window that they share, and keys beyond a pixel's own radius get weight zero. Then
`taps_of` selects each pixel's taps, by products with matrices of zeros and ones. (`tl.gather` would take ten times as
many instructions, because it shuffles registers.)

Shapes: a tile is 4 × 8·ACROSS pixels of one image, N = 2·ACROSS patches, P = 16·N pixels; A = AXIS taps along an axis,
padded; U = A · KEY_COLUMNS pixels in a patch's window. In *patch order*, pixels are numbered patch by patch. A matrix
has a depth of at least 16, but an axis has only A taps, so a matrix also includes 16 // A parts of the other axis.

A key that is not finite affects the kernels of all patches whose window contains it.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.gpu.matrices import dot

__all__ = [
    "corrected",
    "deep_dot",
    "gelu",
    "load_kernel",
    "program_tile",
    "reflected",
    "store_kernel",
    "taps_of",
    "unnormalised",
    "window_distances",
    "window_products",
]


@triton.jit
def program_tile(ACROSS: tl.constexpr):
    """Image, first row and first column of this program's tile. The image is int64, as it is multiplied by sizes."""
    return tl.program_id(2).to(tl.int64), tl.program_id(1) * 4, tl.program_id(0) * 8 * ACROSS


@triton.jit
def reflected(index, size):
    """Reflect indices at the border. Tile pixels outside the image, and their neighbours, map to valid indices."""
    index = tl.abs(index)
    return tl.maximum(size - 1 - tl.abs(size - 1 - index), 0)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x·Φ(x); unless EXACT, with an error of 1e-4, below the resolution of half operands, at half the cost.

    Φ(x) − ½ is x times a polynomial in x², fitted with weight |x| on |x| ≤ 4.25, at whose end it is ½.
    """
    if EXACT:
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        clipped = tl.minimum(tl.maximum(x, -4.25), 4.25)
        square = clipped * clipped
        series = -8.46092237e-10 * square + 7.57118024e-08
        series = series * square - 2.93889665e-06
        series = series * square + 6.55283979e-05
        series = series * square - 9.40457344e-04
        series = series * square + 9.25786116e-03
        series = series * square - 6.54535671e-02
        series = series * square + 3.98420081e-01
        phi = series * clipped + 0.5
    return x * phi


@triton.jit
def deep_dot(a, b, PRECISION: tl.constexpr, BY_WARP: tl.constexpr = False):
    """`dot` in two dimensions; if a's rows are longer than 128 float32, the halves go to different warps.

    Otherwise a warp would need all of its rows at once, in parts, which do not fit in its registers.
    """
    if a.shape[1] * a.dtype.primitive_bitwidth > 128 * 32:
        HALF: tl.constexpr = a.shape[1] // 2
        a = tl.permute(tl.reshape(a, [a.shape[0], 2, HALF]), [1, 0, 2])
        sums = tl.sum(dot(a, tl.reshape(b, [2, HALF, b.shape[1]]), PRECISION), 0)
    else:
        sums = dot(a, b, PRECISION, BY_WARP=BY_WARP)
    return sums


@triton.jit
def _patch_pixels(y0, x0, ACROSS: tl.constexpr):
    """Rows and columns of a tile's pixels in patch order: [P], [P]."""
    pixel = tl.arange(0, 32 * ACROSS)
    patch, place = pixel // 16, pixel % 16
    return y0 + 2 * (patch // ACROSS) + place // 8, x0 + 8 * (patch % ACROSS) + place % 8


@triton.jit
def _window_pixels(
    y0, x0, H, W, RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows and columns of the pixels in the windows of a tile's patches, reflected: [N, U], [N, U]."""
    patch, place = tl.arange(0, 2 * ACROSS)[:, None], tl.arange(0, AXIS * KEY_COLUMNS)[None, :]
    y = y0 + 2 * (patch // ACROSS) + place // KEY_COLUMNS - RADIUS
    x = x0 + 8 * (patch % ACROSS) + place % KEY_COLUMNS - RADIUS
    return reflected(y, H), reflected(x, W)


@triton.jit
def window_products(
    keys, y0, x0, H, W,
    KEY_DIM: tl.constexpr, RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of each pixel's key with those in its patch's window: keys [H, W, KEY_DIM] -> [N, 16, U] float32."""
    y, x = _patch_pixels(y0, x0, ACROSS)
    y, x = reflected(y, H), reflected(x, W)
    near_y, near_x = _window_pixels(y0, x0, H, W, RADIUS, AXIS, ACROSS, KEY_COLUMNS)
    keys += (y0.to(tl.int64) * W + x0) * KEY_DIM  # relative to the tile's first pixel, 32 bits are enough
    here = tl.reshape(((y - y0) * W + (x - x0)) * KEY_DIM, [2 * ACROSS, 16])
    near = ((near_y - y0) * W + (near_x - x0)) * KEY_DIM
    BLOCK: tl.constexpr = 32 if KEY_DIM > 32 else KEY_DIM
    products = tl.zeros([2 * ACROSS, 16, AXIS * KEY_COLUMNS], tl.float32)
    for start in tl.static_range(0, KEY_DIM, BLOCK):
        channel = start + tl.arange(0, BLOCK)[None, None, :]
        centre, window = tl.load(keys + here[:, :, None] + channel), tl.load(keys + near[:, :, None] + channel)
        products = dot(centre, tl.permute(window, [0, 2, 1]), PRECISION, products)
    return products


@triton.jit
def window_distances(
    guidance, stride_c, stride_y, stride_x, y0, x0, H, W,
    GUIDANCE_DIM: tl.constexpr, RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Squared distances of each pixel's guidance to that of its patch's window: [N, 16, U] float32.

    They are computed from differences. Squares minus twice the products, which matrix units could compute, would suffer
    from cancellation.
    """
    y, x = _patch_pixels(y0, x0, ACROSS)
    here = reflected(y, H).to(tl.int64) * stride_y + reflected(x, W).to(tl.int64) * stride_x
    here = tl.reshape(here, [2 * ACROSS, 16])
    y, x = _window_pixels(y0, x0, H, W, RADIUS, AXIS, ACROSS, KEY_COLUMNS)
    near = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    distances = tl.zeros([2 * ACROSS, 16, AXIS * KEY_COLUMNS], tl.float32)
    for channel in range(GUIDANCE_DIM):
        plane = guidance + channel * stride_c
        centre, window = tl.load(plane + here).to(tl.float32), tl.load(plane + near).to(tl.float32)
        difference = centre[:, :, None] - window[:, None, :]
        distances += difference * difference
    return distances


@triton.jit
def unnormalised(products, factor, spatial, smallest):
    """FeatUp's kernel before the division by its sum, with largest weight 1 [N, 16, U]; and a lower bound of that sum.

    `factor` on products and the logarithm of the spatial Gaussian [1, 16, U] are for base 2; the latter is −∞ beyond
    the radius, and at least `smallest` within. The bound is 1e-7 in units in which the softmax without the Gaussian
    sums to 1.
    """
    largest = tl.max(products * factor + spatial, 2, keep_dims=True)
    exponents = products * factor - largest  # the Gaussian is added later, as sums with large products lose digits
    least = tl.zeros_like(largest)
    if smallest < -23.0:  # log2(1e-7); otherwise no sum is that small
        softmax = tl.where(spatial > float("-inf"), tl.exp2(tl.minimum(exponents, 120.0)), 0.0)
        least = 1e-7 * tl.sum(softmax, 2, keep_dims=True)
    return tl.exp2(exponents + spatial), least


@triton.jit
def taps_of(
    window, slide_rows, slide_columns, AXIS: tl.constexpr, ACROSS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Select taps [P, A·A] float32, in patch order, from windows [N, 16, U]; exact, up to rounding of the operands.

    It uses the tables of `kernels.jbu.triton.geometry.slide_tables`, one axis after the other.
    """
    A: tl.constexpr = AXIS
    N: tl.constexpr = 2 * ACROSS
    PARTS: tl.constexpr = 16 // A
    DEPTH: tl.constexpr = PARTS * KEY_COLUMNS
    tap = tl.arange(0, 16)[None, None, :]
    place = tl.arange(0, 8)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, :, None]
    slide = tl.load(slide_columns + place * 16 + tap)
    k = tl.permute(tl.reshape(window, [N * 2, 8, A, KEY_COLUMNS]), [1, 0, 2, 3])
    k = dot(tl.reshape(k, [8, N * 2 * (A // PARTS), DEPTH]), slide, PRECISION).to(window.dtype)
    place = tl.arange(0, 2)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    slide = tl.load(slide_rows + place * 16 + tap)
    k = tl.permute(
        tl.reshape(k, [8, N, 2, A, A // PARTS, PARTS]), [2, 1, 0, 4, 3, 5]
    )  # gy, patch, gx, b, row, its part
    k = dot(tl.reshape(k, [2, N * 8 * (A // PARTS), 16]), slide, PRECISION)
    k = tl.permute(tl.reshape(k, [2, N, 8, A // PARTS, A, PARTS]), [1, 0, 2, 4, 3, 5])  # patch, gy, gx, a, b, its part
    return tl.reshape(k, [N * 16, A * A])


@triton.jit
def corrected(
    kernel, guidance, stride_c, stride_y, stride_x, y0, x0, H, W, weights, bias,
    GUIDANCE_DIM: tl.constexpr, GUIDANCE_ROWS: tl.constexpr, HIDDEN: tl.constexpr, FIXUP_WEIGHT: tl.constexpr,
    AXIS: tl.constexpr, ACROSS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add FeatUp's learned correction, times FIXUP_WEIGHT, to kernels [P, A·A] float32.

    `weights` and `bias` are those of the stage's `Prepared`.
    """
    TAPS: tl.constexpr = AXIS * AXIS
    y, x = _patch_pixels(y0, x0, ACROSS)
    channel, tap = tl.arange(0, GUIDANCE_ROWS), tl.arange(0, TAPS)
    places = (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[:, None] + channel.to(tl.int64)[None, :] * stride_c
    valid = ((y < H) & (x < W))[:, None] & (channel < GUIDANCE_DIM)[None, :]
    colour = tl.load(guidance + places, valid, 0.0)
    colour = tl.where((channel == GUIDANCE_DIM)[None, :], 1.0, colour).to(colour.dtype)  # the channel of the bias
    taps = kernel.to(colour.dtype)
    correction = tl.zeros([32 * ACROSS, TAPS], tl.float32)
    BLOCK: tl.constexpr = 64 if HIDDEN > 64 else HIDDEN
    for start in tl.range(0, HIDDEN, BLOCK, num_stages=1):
        hidden = start + tl.arange(0, BLOCK)
        of_colour = tl.load(weights + channel[:, None] * HIDDEN + hidden[None, :])
        of_taps = tl.load(weights + (GUIDANCE_ROWS + tap)[:, None] * HIDDEN + hidden[None, :])
        second = tl.load(weights + (GUIDANCE_ROWS + TAPS) * HIDDEN + hidden[:, None] * TAPS + tap[None, :])
        sums = deep_dot(taps, of_taps, PRECISION, not EXACT) + dot(colour, of_colour, PRECISION, BY_WARP=not EXACT)
        correction = dot(gelu(sums, EXACT).to(second.dtype), second, PRECISION, correction, BY_WARP=not EXACT)
    return kernel + FIXUP_WEIGHT * (correction + tl.load(bias + tap)[None, :])


@triton.jit
def _kernel_places(
    stride_c, stride_y, stride_x, y0, x0, H, W, RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr
):  # fmt: skip
    """Offsets of a tile's kernels in an image's [n*n, H, W], and which elements are not padding: [P, A·A] each."""
    y, x = _patch_pixels(y0, x0, ACROSS)
    tap = tl.arange(0, AXIS * AXIS)
    a, b = tap // AXIS, tap % AXIS
    valid = ((y < H) & (x < W))[:, None] & ((a <= 2 * RADIUS) & (b <= 2 * RADIUS))[None, :]
    places = (a * (2 * RADIUS + 1) + b).to(tl.int64)[None, :] * stride_c
    return places + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[:, None], valid


@triton.jit
def load_kernel(
    kernel, stride_c, stride_y, stride_x, y0, x0, H, W, RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr
):  # fmt: skip
    """Load a tile's kernels from an image's [n*n, H, W]: [P, A·A] in patch order, 0 outside the image or in padding."""
    places, valid = _kernel_places(stride_c, stride_y, stride_x, y0, x0, H, W, RADIUS, AXIS, ACROSS)
    return tl.load(kernel + places, valid, 0.0)


@triton.jit
def store_kernel(
    taps, kernel, stride_c, stride_y, stride_x, y0, x0, H, W,
    RADIUS: tl.constexpr, AXIS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Store a tile's kernels [P, A·A], in patch order, in an image's [n*n, H, W]."""
    places, valid = _kernel_places(stride_c, stride_y, stride_x, y0, x0, H, W, RADIUS, AXIS, ACROSS)
    tl.store(kernel + places, taps.to(kernel.dtype.element_ty), valid)
