"""Elementwise functions of tiles of vectors: libm has them only for single numbers.

In float32 they are polynomials, accurate to one or two roundings. In float64, which only gradient tests use, they are
those of libm.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numpy.polynomial import Chebyshev, Polynomial

from kernels.internals.numba import declared
from kernels.simd.tiles import constant, elementwise, larger, llvm

__all__ = ["TINY", "exp2", "gelu", "without_denormals"]

# Smaller values become 0: as weights they are negligible next to others of about 1, and products of them are denormal
# numbers, each of which takes a processor as long as a hundred normal ones.
_TINY_EXPONENT = -64.0
TINY = 2.0**-100
_SHIFT = 1.5 * 2.0**23  # adding it to a float32 rounds to an integer
_FAR = 5.25  # Φ(−5.25) = 8e-8: below the float32 resolution at 1


def _fitted(function: Callable[[float], float], degree: int) -> list[float]:
    """Coefficients, lowest power first, of the polynomial that interpolates a function at Chebyshev points in −1…1."""
    fitted = Chebyshev.interpolate(np.vectorize(function), degree).convert(kind=Polynomial)
    return [float(coefficient) for coefficient in fitted.coef]


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    value = constant(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = llvm("fmuladd", builder, value, x, constant(x, coefficient))
    return value


_NEAR_0 = [coefficient * 2.0**power for power, coefficient in enumerate(_fitted(lambda x: 2 ** (x / 2), 6))]


def _exp2(builder: Any, x: Any) -> Any:
    if x.type.element == ir.DoubleType():
        return llvm("exp2", builder, x)
    shifted = builder.fadd(x, constant(x, _SHIFT))
    rest = builder.fsub(x, builder.fsub(shifted, constant(x, _SHIFT)))  # −1/2 … 1/2
    bits = ir.VectorType(ir.IntType(32), x.type.count)
    exponent = builder.shl(builder.bitcast(shifted, bits), ir.Constant(bits, [23] * bits.count))  # from the lowest bits
    power = builder.bitcast(builder.add(exponent, ir.Constant(bits, [127 << 23] * bits.count)), x.type)
    tiny = builder.fcmp_ordered("<", x, constant(x, _TINY_EXPONENT))
    return builder.select(tiny, constant(x, 0.0), builder.fmul(_polynomial(builder, rest, _NEAR_0), power))


def _slope(v: float) -> float:
    """(Φ(x) − 1/2) / x, where Φ is the normal distribution function and v = 2(x / _FAR)² − 1."""
    x = _FAR * math.sqrt(max(v + 1, 1e-12) / 2)
    return math.erf(x * math.sqrt(0.5)) / (2 * x)


_SLOPE = _fitted(_slope, 13)  # with degree 12 the error doubles, with 14 it falls by a third


def _gelu(builder: Any, x: Any) -> Any:
    half = constant(x, 0.5)
    if x.type.element == ir.DoubleType():
        erf = _erf(builder, builder.fmul(x, constant(x, math.sqrt(0.5))))
        return builder.fmul(x, llvm("fmuladd", builder, erf, half, half))
    near = builder.fneg(larger(builder, x, constant(x, -_FAR)))
    near = builder.fneg(larger(builder, near, constant(x, -_FAR)))
    v = llvm("fmuladd", builder, builder.fmul(near, near), constant(x, 2 / _FAR**2), constant(x, -1.0))
    phi = llvm("fmuladd", builder, near, _polynomial(builder, v, _SLOPE), half)
    below = builder.fcmp_ordered("<", x, constant(x, -_FAR))
    return builder.select(below, constant(x, 0.0), builder.fmul(x, phi))


def _erf(builder: Any, x: Any) -> Any:
    element = x.type.element
    erf = declared(builder, ir.FunctionType(element, [element]), "erf")
    for lane in (ir.Constant(ir.IntType(32), k) for k in range(x.type.count)):
        x = builder.insert_element(x, builder.call(erf, [builder.extract_element(x, lane)]), lane)
    return x


def _without_denormals(builder: Any, x: Any) -> Any:
    if x.type.element == ir.DoubleType():
        return x
    tiny = builder.fcmp_ordered("<", llvm("fabs", builder, x), constant(x, TINY))
    return builder.select(tiny, constant(x, 0.0), x)


# 2^x. In float32, for x < 128: error within 1e-7 of 2^x, and 0 for x < −64.
exp2 = elementwise(_exp2, 1)

# x·Φ(x). In float32: error within 2.4e-7·max(1, |x|); torch's own is within 3.6e-7·max(1, |x|).
gelu = elementwise(_gelu, 1)

# Its argument; in float32, 0 where that is below TINY in magnitude.
without_denormals = elementwise(_without_denormals, 1)
