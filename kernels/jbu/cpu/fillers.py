"""Fill blocks of kernels, a few rows of an image at a time, from a tensor or from a guidance image."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kernels.jbu.cpu import kernel_rows
from kernels.jbu.cpu.layout import (
    STRIP,
    DType,
    aligned_zeros,
    array_of,
    image_rows,
    in_strips,
    kernel_blocks,
    pack,
    vector_lanes,
)
from kernels.jbu.parameters import StageParameters
from kernels.jbu.reference import FIXUP_WEIGHT
from kernels.simd.threads import in_threads, row_jobs
from kernels.simd.tiles import Array

__all__ = ["PAIRS", "Consumer", "Fillers", "bilateral", "given", "learned", "products"]

PAIRS = 4  # pairs of rows at a time: at 224 pixels their kernels are 0.4 MB, which fits a core's second-level cache
_THREAD_PIXELS = 1024  # minimum number of pixels that makes waking a thread worthwhile
_LOG2_E = 1 / np.log(2)

# Both take the image's number, blocks of kernels, and the first pair of rows.
_Filler = Callable[[int, Array, int], None]
Consumer = Callable[[int, Array, int], None]


@dataclass(frozen=True)
class Fillers:
    """A source of kernels.

    Attributes:
        make: returns a function that fills the given blocks with kernels. It has its own scratch memory, so one is made
            for each thread.
        shape: B, H, W of all kernels.
        radius: radius of the kernels.
        dtype: dtype of the kernels.
    """

    make: Callable[[], _Filler]
    shape: tuple[int, int, int]
    radius: int
    dtype: DType

    def feed(self, make_consumer: Callable[[], Consumer]) -> None:
        """Compute all kernels, a few rows at a time, and pass them on while they are in a core's cache.

        Args:
            make_consumer: returns a function that takes the kernels; one is made for each thread.
        """
        B, H, W = self.shape

        def worker() -> Callable[[tuple[int, int, int]], None]:
            fill, consume = self.make(), make_consumer()
            room = kernel_blocks(PAIRS, W, self.radius, self.dtype)

            def run(job: tuple[int, int, int]) -> None:
                image, start, stop = job
                for y in range(start, stop, PAIRS):
                    kernels = room[: stop - y]
                    fill(image, kernels, y)
                    consume(image, kernels, y)

            return run

        in_threads(row_jobs(B, -(-H // 2), PAIRS), worker, B * H * W // _THREAD_PIXELS)


def given(kernel: Tensor, radius: int, dtype: DType) -> Fillers:
    """Kernels from a tensor [B, n*n, H, W]."""
    array = np.ascontiguousarray(array_of(kernel, dtype))

    def fill(image: int, kernels: Array, y: int) -> None:
        pack(array[image], kernels, y)

    return Fillers(lambda: fill, _shape(kernel), radius, dtype)


def products(own: Array, others: Array, W: int, radius: int) -> Fillers:
    """Products of own with others' neighbours, instead of kernels: both [B, H, D, width], pixel 0 at column radius."""

    def make() -> _Filler:
        scratch = _scratch(radius, 0, own.dtype)
        return lambda image, kernels, y: kernel_rows.products(own[image], others[image], radius, scratch, kernels, y)

    return Fillers(make, (*own.shape[:2], W), radius, own.dtype)


def bilateral(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int, dtype: DType) -> Fillers:
    """As `kernels.jbu.reference.bilateral_kernel`, from a guidance image [B, G, H, W]."""
    rows = image_rows(array_of(guidance, dtype), radius, radius, dtype)
    squares = np.arange(-radius, radius + 1, dtype=np.float64) ** 2
    with np.errstate(divide="ignore", over="ignore"):
        spatial = (-(squares[:, None] + squares[None, :]).ravel() / (2 * sigma_spatial**2) * _LOG2_E).astype(dtype)
        factor = -0.5 * _LOG2_E / np.square(np.float64(sigma_range))
    factor = max(float(factor), float(np.finfo(dtype).min))  # finite, so that its product with a distance of 0 is 0

    def make() -> _Filler:
        scratch = _scratch(radius, 0, dtype)
        return lambda image, kernels, y: kernel_rows.bilateral(
            rows[image], spatial, factor, radius, scratch, kernels, y
        )

    return Fillers(make, _shape(guidance), radius, dtype)


def learned(guidance: Tensor, stage: StageParameters, dtype: DType) -> Fillers:
    """As `kernels.jbu.reference.learned_kernel`, from a guidance image [B, G, H, W]."""
    radius, (B, H, W), L = stage.radius, _shape(guidance), vector_lanes(dtype)
    rows = image_rows(array_of(guidance, dtype), radius, radius, dtype)
    of_keys = (
        *_layer(stage.key_weight0, stage.key_bias0, kernel_rows.KEY_STRIP, dtype),
        *_layer(stage.key_weight1, stage.key_bias1, kernel_rows.KEY_STRIP, dtype),
    )
    correction = (
        *_layer(stage.fixup_weight0, stage.fixup_bias0, STRIP, dtype),
        *_layer(stage.fixup_weight1, stage.fixup_bias1, STRIP, dtype, FIXUP_WEIGHT),
    )
    offsets = np.linspace(-1, 1, 2 * radius + 1) ** 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        temperature = float(np.clip(np.exp(np.float64(stage.range_temp.item())), 1e-4, 1e4)) * _LOG2_E
        sharpness = 1 / (2 * np.square(np.float64(stage.sigma_spatial.item())))
        gaussian = np.exp(-(offsets[:, None] + offsets[None, :]).ravel() * sharpness).astype(dtype)
    gaussian[gaussian < np.sqrt(np.finfo(dtype).tiny)] = 0  # negligible, and would lead to denormal numbers

    def make() -> _Filler:
        channels = in_strips(len(stage.key_bias1), kernel_rows.KEY_STRIP)
        at_once = 2 * PAIRS + 2 * radius
        keys = aligned_zeros((1 << (at_once - 1).bit_length(), channels, rows.shape[3]), dtype)
        hidden_keys = aligned_zeros((1, channels, 2 * L), dtype)
        scratch = _scratch(radius, rows.shape[2], dtype)
        hidden = aligned_zeros((1, in_strips((2 * radius + 1) ** 2), 2 * L), dtype)
        known = -1, 0, 0  # image, first row and row after the last whose keys are computed

        def fill(image: int, kernels: Array, y: int) -> None:
            nonlocal known
            first, stop = max(0, 2 * y - radius), min(H, 2 * (y + len(kernels)) + radius)
            missing = known[2] if known[0] == image and known[1] <= first <= known[2] else first
            kernel_rows.keys(rows[image], *of_keys, hidden_keys, keys, W, radius, missing, stop)
            known = image, first, stop
            constant = temperature, gaussian, *correction, radius, scratch, hidden
            kernel_rows.learned(keys, rows[image], *constant, kernels, y)

        return fill

    return Fillers(make, (B, H, W), radius, dtype)


def _layer(weight: Tensor, bias: Tensor, strip: int, dtype: DType, factor: float = 1.0) -> tuple[Array, Array]:
    """Weights [strips, inputs, strip] and biases [strips, strip] of a 1×1 convolution [outputs, inputs]."""
    outputs, inputs = weight.shape
    weights = np.zeros((in_strips(outputs, strip), inputs + 1), dtype)
    weights[:outputs, :inputs], weights[:outputs, inputs] = array_of(weight, dtype), array_of(bias, dtype)
    weights *= factor
    in_order = np.ascontiguousarray(weights.reshape(-1, strip, inputs + 1).transpose(0, 2, 1))
    return np.ascontiguousarray(in_order[:, :inputs]), np.ascontiguousarray(in_order[:, inputs])


def _scratch(radius: int, channels: int, dtype: DType) -> Array:
    """Scratch memory for the taps of one block (see `kernels.jbu.cpu.kernel_rows`) and the guidance channels."""
    n = 2 * radius + 1
    return aligned_zeros((1, n * n + 2 * n + STRIP + channels, 2 * vector_lanes(dtype)), dtype)


def _shape(image: Tensor) -> tuple[int, int, int]:
    return image.shape[0], image.shape[2], image.shape[3]
