"""Encode features as int8 codes with one step per component, or as float16. Both encodings are defined only here.

`quantized` defines the codes in plain torch; every kernel that writes codes is tested against it. `Encoding.encode`
computes the same in blocks that fit in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["INT8_MAX", "Codes", "Encoding", "Quantization", "quantized"]

INT8_MAX = 127  # codes are symmetric; -128 is the store's fill value, see densefeat.layout.INT8_NO_DATA
_ROWS_IN_CACHE = 8  # with 128 components at 224 px: 0.9 MB of float32


@dataclass(frozen=True)
class Quantization:
    """Parameters of int8 codes: ``round((feature + offset) / step)``, halves to even, clipped to ±127.

    Attributes:
        step: [C] float32, > 0.
        offset: [C] float32, added before the division.
    """

    step: Tensor
    offset: Tensor


class Codes(NamedTuple):
    """Encoded features.

    Attributes:
        codes: [B, C, H, W], contiguous: int8 in −127 … 127, and 0 where the scaled feature is not finite; or float16.
        not_finite: [B] int32, number of values that are NaN or infinite: for int8 after the division by the step, for
            float16 after rounding, so that values beyond its range are included.
        clipped: [B] int32, number of finite values beyond ±127 steps; 0 for float16.
    """

    codes: Tensor
    not_finite: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class Encoding:
    """Encoding of features as stored values: int8 codes, or float16.

    Attributes:
        step: quantization steps [k] float32, > 0, on the device of the features; None for float16.
    """

    step: Tensor | None

    @classmethod
    def of_steps(cls, step: npt.NDArray[np.float32] | None, device: torch.device) -> "Encoding":
        """The encoding of a store: int8 with its steps [k], or float16 if it has none."""
        return cls(None if step is None else torch.tensor(step, device=device))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values: ``torch.int8`` or ``torch.float16``."""
        return torch.float16 if self.step is None else torch.int8

    def quantization(self, offset: Tensor | None = None) -> Quantization | None:
        """Parameters for kernels that write codes.

        Args:
            offset: [k] float32, added to the features before the division; None for zeros.

        Returns:
            Step and offset; None for float16, which no kernel writes.
        """
        if self.step is None:
            return None
        return Quantization(self.step, torch.zeros_like(self.step) if offset is None else offset)

    def encode(self, features: Tensor, offset: Tensor | None = None) -> Codes:
        """Encode features.

        Args:
            features: [B, k, H, W], floating. NaN, infinities and clipped values are counted per image.
            offset: [k] float32, added to the features in float32 before they are encoded; None for none.

        Returns:
            The codes, on the device of the features.
        """
        quantization = self.quantization(offset)
        return _as_float16(features, offset) if quantization is None else _as_int8(features, quantization)


def quantized(features: Tensor, quantization: Quantization) -> Codes:
    """Definition of the codes of features [B, C, H, W], computed in float32, or in float64 for float64 features."""
    wide = features.double() if features.dtype == torch.float64 else features.float()
    scaled = ((wide + quantization.offset[:, None, None]) / quantization.step[:, None, None]).round()
    finite = scaled.isfinite()
    clipped = finite & (scaled.abs() > INT8_MAX)
    codes = scaled.nan_to_num(0, 0, 0).clamp(-INT8_MAX, INT8_MAX).to(torch.int8).contiguous()
    return Codes(codes, (~finite).sum((1, 2, 3), dtype=torch.int32), clipped.sum((1, 2, 3), dtype=torch.int32))


def _as_int8(features: Tensor, quantization: Quantization) -> Codes:
    """As `quantized`, but block by block, and in float32 for every dtype of the features."""
    codes = torch.empty(features.shape, dtype=torch.int8, device=features.device)
    not_finite, clipped = (torch.zeros(len(features), dtype=torch.int32, device=features.device) for _ in range(2))
    step, offset = quantization.step[:, None, None], quantization.offset[:, None, None]
    for images, rows in _blocks(features):
        scaled = ((features[images, :, rows].float() + offset) / step).round_()
        # One pass: a sum is finite only if every term is, and in float64 finite terms cannot overflow it.
        whole = scaled.sum((1, 2, 3), dtype=torch.float64).isfinite()
        if not whole.all():
            not_finite[images] += (~scaled.isfinite()).sum((1, 2, 3), dtype=torch.int32)
            scaled.nan_to_num_(0, 0, 0)
        clipped[images] += (scaled.abs() > INT8_MAX).sum((1, 2, 3), dtype=torch.int32)
        codes[images, :, rows] = scaled.clamp_(-INT8_MAX, INT8_MAX)
    return Codes(codes, not_finite, clipped)


def _as_float16(features: Tensor, offset: Tensor | None) -> Codes:
    """Features rounded to float16 block by block, after the offset is added in float32."""
    halves = torch.empty(features.shape, dtype=torch.float16, device=features.device)
    not_finite = torch.zeros(len(features), dtype=torch.int32, device=features.device)
    for images, rows in _blocks(features):
        block = features[images, :, rows]
        block = block if offset is None else block.float() + offset[:, None, None]
        rounded = halves[images, :, rows] = block.half()
        if not rounded.sum(dtype=torch.float64).isfinite():
            not_finite[images] += (~rounded.isfinite()).sum((1, 2, 3), dtype=torch.int32)
    return Codes(halves, not_finite, torch.zeros_like(not_finite))


def _blocks(features: Tensor) -> Iterator[tuple[slice, slice]]:
    """(images, rows) to process at a time: everything on a GPU, a few rows that fit in the cache on a CPU.

    Whole batches would go through memory in each operation: 19 ms per image instead of 8 (k = 64, 224 px, two cores).
    """
    images, _, height, _ = features.shape
    if features.is_cuda:
        yield slice(None), slice(None)
        return
    for image in range(images):
        for row in range(0, height, _ROWS_IN_CACHE):
            yield slice(image, image + 1), slice(row, row + _ROWS_IN_CACHE)
