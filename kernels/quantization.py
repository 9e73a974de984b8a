"""Features as int8 codes: what a kernel's epilogue computes, with its definition in plain torch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Codes", "Quantization", "quantized"]

INT8_MAX = 127


@dataclass(frozen=True)
class Quantization:
    """How features become int8 codes: ``round((feature + offset) / step)``, halves to even, clipped to ±127.

    Attributes:
        step: [C] float32, > 0.
        offset: [C] float32, added before dividing.
    """

    step: Tensor
    offset: Tensor


class Codes(NamedTuple):
    """Quantized features.

    Attributes:
        codes: [B, C, H, W] int8, −127 … 127, contiguous; 0 where the feature was not finite.
        not_finite: [B] int32, values whose quotient by the step is NaN or infinite.
        clipped: [B] int32, finite values beyond ±127 steps.
    """

    codes: Tensor
    not_finite: Tensor
    clipped: Tensor


def quantized(features: Tensor, quantization: Quantization) -> Codes:
    """Codes of features [B, C, H, W], computed in float32, or in float64 for float64 features."""
    wide = features.double() if features.dtype == torch.float64 else features.float()
    scaled = ((wide + quantization.offset[:, None, None]) / quantization.step[:, None, None]).round()
    finite = scaled.isfinite()
    clipped = finite & (scaled.abs() > INT8_MAX)
    codes = scaled.nan_to_num(0, 0, 0).clamp(-INT8_MAX, INT8_MAX).to(torch.int8).contiguous()
    return Codes(codes, (~finite).sum((1, 2, 3), dtype=torch.int32), clipped.sum((1, 2, 3), dtype=torch.int32))
