"""Products on matrix units."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from kernels.gpu.requirements import INTERPRETED

__all__ = ["dot", "precision"]

_INTERPRETED = tl.constexpr(INTERPRETED)


def precision(dtype: torch.dtype, result: torch.dtype | None = None) -> str:
    """Precision of products of float32 matrices: three tf32 products, or one if the result is half.

    Args:
        dtype: dtype of the matrices.
        result: dtype of the final result; that of the matrices if None.
    """
    return "tf32x3" if (result or dtype) == torch.float32 else "tf32"


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, sums=None, BY_WARP: tl.constexpr = False):
    """a [..., M, K] @ b [..., K, N], added to sums: float32.

    Args:
        a: first factor.
        b: second factor.
        PRECISION: see `precision`.
        sums: added to the products; None for none.
        BY_WARP: avoid Hopper's ``wgmma``, which Triton uses for two dimensions. ptxas 12.8, which comes with Triton
            3.6, miscompiles the correction of a learned stage with it, for half features: features have the right
            magnitude but wrong values, and the kernel reads beyond the source.
    """
    if _INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    plain: tl.constexpr = sums is None  # Triton 3.2 does not accept None for sums
    if BY_WARP:
        products = tl.reshape(tl.dot(a[None, :, :], b[None, :, :], input_precision=PRECISION), [a.shape[0], b.shape[1]])
        result = products if plain else products + sums
    else:
        result = tl.dot(a, b, input_precision=PRECISION) if plain else tl.dot(a, b, sums, input_precision=PRECISION)
    return result
