"""Quantization within kernels."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = ["quantize"]

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to an integer, halves to even


@triton.jit
def quantize(features, step, offset, valid, EXACT: tl.constexpr):
    """As `kernels.quantization.quantized`: codes, and the numbers of valid values not finite and clipped.

    Unless EXACT, `step` is 1 / step.
    """
    scaled = tl.div_rn(features + offset, step) if EXACT else (features + offset) * step
    rounded = tl.minimum(tl.maximum(scaled, -127.0), 127.0) + _ROUND
    codes = rounded.to(tl.int32, bitcast=True).to(tl.int8)  # the low bits of the mantissa
    beyond = tl.sum((valid & ~(tl.abs(scaled) < 127.5)).to(tl.int32))
    infinite = 0
    if beyond > 0:
        finite = tl.abs(scaled) < float("inf")
        codes = tl.where(finite, codes, 0)
        infinite = tl.sum((valid & ~finite).to(tl.int32))
    return codes, infinite, beyond - infinite
