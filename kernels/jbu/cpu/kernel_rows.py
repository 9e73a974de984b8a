"""Compute kernels from a guidance image, compiled: products, softmax and correction, block by block.

A block's kernels, two rows × L columns of pixels, stay in the first-level cache from the products to the last addition.
With two rows, a neighbour serves two pixels: loading and shifting it costs more than multiplying it. At 224 pixels and
radius 3, one core of a Xeon with AVX-512 took 0.6 ms for the training-free kernels. The learned kernels took 1.1 ms
(keys) and 5.2 ms, of which 1.5 ms for the products, 2.3 ms for the correction's matrix products (88% of the core's
peak) and 1.2 ms for exp and GELU.

Notation: D key and G guidance channels, T = n*n taps, L pixels in a vector. Images and kernels are stored as in
`kernels.jbu.cpu.layout`, images with pixel 0 at column radius.
"""

from typing import Any

from kernels.compilation import compiled
from kernels.jbu.cpu.layout import STRIP, reflected
from kernels.simd.functions import exp2, gelu
from kernels.simd.memory import lanes, load_row, load_tile, load_window, splat, splats, store_tile, zeros
from kernels.simd.tiles import Array, fma, inlined, maximum

__all__ = ["KEY_STRIP", "bilateral", "keys", "learned", "products"]

KEY_STRIP = 8  # key channels computed at once: the published 32 are 4 strips


@inlined
def _dense(weights: Array, bias: Array, strip: int, inputs: Array, row: int, first: int, x: int, zero: Any) -> Any:
    """One strip of a 1×1 convolution, on as many pixels as a row of ``zero`` has.

    weights [strips, channels, strip], bias [strips, strip], inputs [rows, first + channels, ≥ x + pixels].
    """
    sums = zero + splats(bias, (strip, 0), zero)
    for channel in range(weights.shape[1]):
        pixels = load_row(inputs, (row, first + channel, x), zero)
        sums = fma(splats(weights, (strip, channel, 0), zero), pixels, sums)
    return sums


@compiled
def keys(
    guidance: Array,
    weight0: Array,
    bias0: Array,
    weight1: Array,
    bias1: Array,
    hidden: Array,
    output: Array,
    W: int,
    radius: int,
    start: int,
    stop: int,
) -> None:
    """Apply two 1×1 convolutions with a GELU between them to rows start…stop of an image, and reflect the margins.

    Args:
        guidance: [H, G, width].
        weight0: [strips, G, KEY_STRIP], padded with zeros like all weights.
        bias0: [strips, KEY_STRIP].
        weight1: [strips, D, KEY_STRIP].
        bias1: [strips, KEY_STRIP].
        hidden: scratch [1, D in whole strips, 2*L].
        output: [a power of two, D in whole strips, width]; row y is written at y modulo its length.
        W: pixels of a row.
        radius: width of the margins.
        start: first row.
        stop: row after the last.
    """
    L, left = lanes(guidance), radius
    zero = zeros(guidance, KEY_STRIP, 2)
    for y in range(start, stop):
        row = y & (output.shape[0] - 1)
        for x in range(left, left + W, 2 * L):
            for strip in range(bias0.shape[0]):
                sums = gelu(_dense(weight0, bias0, strip, guidance, y, 0, x, zero))
                store_tile(hidden, (0, strip * KEY_STRIP, 0), sums, 2 * L, L)
            for strip in range(bias1.shape[0]):
                sums = _dense(weight1, bias1, strip, hidden, 0, 0, 0, zero)
                store_tile(output, (row, strip * KEY_STRIP, x), sums, output.shape[2], L)
        for d in range(output.shape[1]):
            for k in range(1, radius + 1):
                output[row, d, left - k] = output[row, d, left + k]
                output[row, d, left + W - 1 + k] = output[row, d, left + W - 1 - k]


@inlined
def _block_products(
    own: Array, others: Array, H: int, mask: int, y: int, x: int, radius: int, sums_of_taps: Array, squared: bool
) -> None:
    """Sum over channels the products of a block's pixels with their neighbours, or their squared differences.

    own and others [rows, D, width], row y of H at y & mask; sums_of_taps [1, n + T + n and a strip, 2*L] gets tap t at
    n + t, and the elements around the taps are overwritten.
    """
    n, L = 2 * radius + 1, lanes(own)
    first, second = 2 * y & mask, min(2 * y + 1, H - 1) & mask
    to_second = (second - first) * own.shape[1] * own.shape[2]
    for a in range(n + 1):  # tap row a of the first row is a - 1 of the second; each uses n of the n + 1 rows
        row = reflected(2 * y + a - radius, H) & mask
        for b in range(0, n, STRIP):
            sums = zeros(own, STRIP, 2)
            for d in range(own.shape[1]):
                neighbours = load_window(others, (row, d, x + b), sums)
                pixels = load_tile(own, (first, d, x + radius), 1, 2, 0, to_second)
                if squared:
                    differences = neighbours - pixels
                    sums = fma(differences, differences, sums)
                else:
                    sums = fma(neighbours, pixels, sums)
            store_tile(sums_of_taps, (0, n + a * n + b, 0), sums, 2 * L, L - 2 * L * n)


@compiled
def products(own: Array, others: Array, radius: int, scratch: Array, kernels: Array, y: int) -> None:
    """Products of own with others' neighbours, summed over channels: [H, D, width] -> [rows, blocks, taps, 2, L]."""
    n, L = 2 * radius + 1, lanes(own)
    for row in range(kernels.shape[0]):
        for block in range(kernels.shape[1]):
            _block_products(own, others, own.shape[0], -1, y + row, block * L, radius, scratch, False)
            for t in range(n * n):
                pair = load_row(scratch, (0, n + t, 0), zeros(own, 1, 2))
                store_tile(kernels, (row, block, t, 0, 0), pair, 0, L)


@compiled
def bilateral(
    guidance: Array, spatial: Array, factor: float, radius: int, scratch: Array, kernels: Array, y: int
) -> None:
    """Compute the training-free kernels of the row pairs y, y + 1, … of an image, filling ``kernels``.

    Args:
        guidance: [H, G, width].
        spatial: [T], base-2 exponents of the spatial Gaussian.
        factor: factor from the squared colour distance to the base-2 exponent of the range Gaussian; finite.
        radius: radius of the kernel.
        scratch: [1, T + 2*n + STRIP, 2*L].
        kernels: [rows, blocks, taps, 2, L], filled.
        y: first pair of rows.
    """
    n, L = 2 * radius + 1, lanes(guidance)
    one_row = zeros(guidance, 1, 2)
    for row in range(kernels.shape[0]):
        for block in range(kernels.shape[1]):
            _block_products(guidance, guidance, guidance.shape[0], -1, y + row, block * L, radius, scratch, True)
            total = one_row
            for t in range(n * n):  # the largest exponent is known: it is that of the pixel itself, 0
                distances = load_row(scratch, (0, n + t, 0), one_row)
                weights = exp2(fma(distances, factor, splat(spatial, (t,))))
                total = total + weights
                store_tile(scratch, (0, n + t, 0), weights, 0, L)
            normalise = 1.0 / total
            for t in range(n * n):
                weights = load_row(scratch, (0, n + t, 0), one_row) * normalise
                store_tile(kernels, (row, block, t, 0, 0), weights, 0, L)


@compiled
def learned(
    keys: Array,
    guidance: Array,
    temperature: float,
    gaussian: Array,
    weight0: Array,
    bias0: Array,
    weight1: Array,
    bias1: Array,
    radius: int,
    scratch: Array,
    hidden: Array,
    kernels: Array,
    y: int,
) -> None:
    """Compute FeatUp's kernels of the row pairs y, y + 1, … of an image, filling ``kernels``.

    Args:
        keys: [a power of two, D, width]: keys of these rows and of radius rows around them, row y at y modulo its
            length.
        guidance: [H, G, width].
        temperature: factor from a product of keys to the base-2 exponent.
        gaussian: [T], the spatial Gaussian.
        weight0: [strips, T + G, STRIP], padded with zeros like all weights.
        bias0: [strips, STRIP].
        weight1: [strips, T, STRIP], multiplied by the factor of the correction.
        bias1: [strips, STRIP], likewise.
        radius: radius of the kernel.
        scratch: [1, T + 2*n + STRIP + G, 2*L].
        hidden: scratch [1, T in whole strips, 2*L].
        kernels: [rows, blocks, taps, 2, L], filled.
        y: first pair of rows.
    """
    n, L, H = 2 * radius + 1, lanes(keys), guidance.shape[0]
    T, G = n * n, guidance.shape[1]
    one_row, zero = zeros(keys, 1, 2), zeros(keys, STRIP, 2)
    for row in range(kernels.shape[0]):
        to_second_row = G * guidance.shape[2] * (min(2 * (y + row) + 1, H - 1) - 2 * (y + row))
        for block in range(kernels.shape[1]):
            _block_products(keys, keys, H, keys.shape[0] - 1, y + row, block * L, radius, scratch, False)
            top = load_row(scratch, (0, n, 0), one_row)
            for t in range(1, T):
                top = maximum(top, load_row(scratch, (0, n + t, 0), one_row))
            total, weighted = one_row, one_row
            for t in range(T):
                weights = exp2((load_row(scratch, (0, n + t, 0), one_row) - top) * temperature)
                total = total + weights
                weights = weights * splat(gaussian, (t,))
                weighted = weighted + weights
                store_tile(scratch, (0, n + t, 0), weights, 0, L)
            # Softmax, Gaussian, and division by the sum clamped to 1e-7, in one step.
            normalise = 1.0 / maximum(weighted, total * 1e-7)
            for t in range(T):
                weights = load_row(scratch, (0, n + t, 0), one_row) * normalise
                store_tile(scratch, (0, n + t, 0), weights, 0, L)
            for g in range(G):
                x = radius + block * L
                colours = load_tile(guidance, (2 * (y + row), g, x), 1, 2, 0, to_second_row)
                store_tile(scratch, (0, n + T + g, 0), colours, 0, L)
            for strip in range(bias0.shape[0]):
                sums = gelu(_dense(weight0, bias0, strip, scratch, 0, n, 0, zero))
                store_tile(hidden, (0, strip * STRIP, 0), sums, 2 * L, L)
            for strip in range(bias1.shape[0]):
                correction = _dense(weight1, bias1, strip, hidden, 0, 0, 0, zero)
                kernel = load_tile(scratch, (0, n + strip * STRIP, 0), STRIP, 2, 2 * L, L)
                store_tile(kernels, (row, block, strip * STRIP, 0, 0), kernel + correction, 2 * L, L)
