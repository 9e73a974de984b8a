"""Joint bilateral upsampling on NVIDIA GPUs, in Triton: every operation, forward and backward.

A stage is one launch for the whole batch; a learned stage has a small launch before it, for keys and parameters.
Kernels are computed, folded to the low-res grid, applied and optionally quantized on the chip. Sums are float32.
Products use the matrix units: half-precision operands for half inputs, three tf32 products for float32 inputs, one tf32
product if the output is half. There are no floating-point atomics, so results are reproducible, and do not depend on
the rest of the batch.

`kernels.jbu.triton.taps` and `kernels.jbu.triton.window` explain the method.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Kind
from kernels.gpu.matrices import precision
from kernels.gpu.requirements import not_for_triton
from kernels.jbu.parameters import StageParameters
from kernels.jbu.reference import FIXUP_WEIGHT
from kernels.jbu.triton.backward import adaptive_conv_upsample2x_backward, range_products_backward
from kernels.jbu.triton.forward import run_tiles
from kernels.jbu.triton.geometry import MAX_RADIUS, Geometry, axis_tables, slide_tables, squared_distances
from kernels.jbu.triton.launching import by_pixel, channel_block, launch, padded_keys, strides
from kernels.jbu.triton.learned import guidance_rows, prepare
from kernels.quantization import Codes, Quantization

__all__ = [
    "FORWARD_MODE",
    "LIMITS",
    "adaptive_conv_upsample2x",
    "adaptive_conv_upsample2x_backward",
    "bilateral_kernel",
    "bilateral_stage",
    "learned_kernel",
    "learned_stage",
    "range_products",
    "range_products_backward",
    "reasons_not",
]

LIMITS = {"radius": MAX_RADIUS}
FORWARD_MODE = False


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why this implementation cannot take inputs of these kinds; none if it can."""
    return not_for_triton(kinds)


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor) -> Tensor:
    """As `kernels.jbu.reference.adaptive_conv_upsample2x`: [B, C, h, w] and [B, n*n, 2h, 2w] -> [B, C, 2h, 2w]."""
    geometry = Geometry(math.isqrt(kernel.shape[1]) // 2)
    output = _upsampled(geometry, source, None, KERNEL="given", **strides("kernel", kernel))
    assert isinstance(output, Tensor)
    return output


def range_products(keys: Tensor, radius: int) -> Tensor:
    """As `kernels.jbu.reference.range_products`: keys [B, D, H, W] -> [B, n*n, H, W]."""
    geometry = Geometry(radius)
    keys_by_pixel = padded_keys(keys)
    made = {
        "KERNEL": "products",
        "KEY_DIM": keys_by_pixel.shape[3],
        "keys": keys_by_pixel,
        "spatial": _spatial_gaussian(geometry, 1.0, keys.device),  # only to tell which taps are within the radius
        **_slides(geometry, keys.dtype, keys.device),
    }
    return _kernels(geometry, keys, **made)


def bilateral_kernel(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int) -> Tensor:
    """As `kernels.jbu.reference.bilateral_kernel`: guidance [B, G, H, W] -> [B, n*n, H, W]."""
    geometry = Geometry(radius)
    return _kernels(geometry, guidance, **_bilateral(geometry, guidance, sigma_spatial, sigma_range, guidance.dtype))


def learned_kernel(guidance: Tensor, stage: StageParameters) -> Tensor:
    """As `kernels.jbu.reference.learned_kernel`: guidance [B, G, H, W] -> [B, n*n, H, W]."""
    geometry = Geometry(stage.radius)
    return _kernels(geometry, guidance, **_learned(geometry, guidance, stage, guidance.dtype))


def bilateral_stage(
    source: Tensor,
    guidance: Tensor,
    sigma_spatial: float,
    sigma_range: float,
    radius: int,
    quantization: Quantization | None = None,
) -> Tensor | Codes:
    """As `kernels.jbu.reference.bilateral_stage`: source [B, C, h, w], guidance [B, G, 2h, 2w] -> [B, C, 2h, 2w].

    With a quantization, it returns codes of the float32 sums, even for half features, which would be rounded first.
    """
    geometry = Geometry(radius)
    made = _bilateral(geometry, guidance, sigma_spatial, sigma_range, source.dtype)
    return _upsampled(geometry, source, quantization, **made)


def learned_stage(
    source: Tensor, guidance: Tensor, stage: StageParameters, quantization: Quantization | None = None
) -> Tensor | Codes:
    """As `kernels.jbu.reference.learned_stage`: source [B, C, h, w], guidance [B, G, 2h, 2w] -> [B, C, 2h, 2w].

    With a quantization, it returns codes of the float32 sums, even for half features, which would be rounded first.
    """
    geometry = Geometry(stage.radius)
    return _upsampled(geometry, source, quantization, **_learned(geometry, guidance, stage, source.dtype))


def _bilateral(
    geometry: Geometry, guidance: Tensor, sigma_spatial: float, sigma_range: float, result: torch.dtype
) -> dict[str, Any]:
    factor = max(-math.log2(math.e) / (2 * sigma_range) / sigma_range, -3e38)  # finite: equal colours give 0, not NaN
    return strides("guidance", guidance) | {
        "KERNEL": "bilateral",
        "GUIDANCE_DIM": guidance.shape[1],
        "spatial": _spatial_gaussian(geometry, sigma_spatial, guidance.device),
        "range_factor": factor,
        **_slides(geometry, result, guidance.device),
    }


def _learned(geometry: Geometry, guidance: Tensor, stage: StageParameters, result: torch.dtype) -> dict[str, Any]:
    prepared = prepare(guidance, stage, geometry, result)
    return strides("guidance", guidance) | {
        "KERNEL": "learned",
        "KEY_DIM": prepared.keys.shape[3],
        "GUIDANCE_DIM": guidance.shape[1],
        "GUIDANCE_ROWS": guidance_rows(guidance.shape[1]),
        "HIDDEN": geometry.hidden,
        "FIXUP_WEIGHT": FIXUP_WEIGHT,
        "KERNEL_PRECISION": precision(guidance.dtype, result),
        **_slides(geometry, guidance.dtype, guidance.device),
        **prepared._asdict(),
    }


def _slides(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return dict(zip(("slide_rows", "slide_columns"), slide_tables(geometry, dtype, device), strict=True))


@functools.lru_cache(maxsize=64)
def _spatial_gaussian(geometry: Geometry, sigma: float, device: torch.device) -> Tensor:
    """Base-2 logarithm of the Gaussian from a patch's pixels to its window's; −∞ beyond the radius. [16, U] float32."""
    squared = squared_distances(geometry, torch.device("cpu")).double()
    return torch.where(squared < 0, -math.inf, -squared / (2 * sigma**2) * math.log2(math.e)).float().to(device)


def _kernels(geometry: Geometry, image: Tensor, **made: Any) -> Tensor:
    """Kernels [B, n*n, H, W] for an image [B, …, H, W], in its dtype."""
    B, _, H, W = image.shape
    kernel = image.new_empty(B, geometry.width**2, H, W)
    _run(geometry, image.dtype, B, H, W, OUTPUT="kernel", **strides("kernel", kernel), **made)
    return kernel


def _upsampled(geometry: Geometry, source: Tensor, quantization: Quantization | None, **made: Any) -> Tensor | Codes:
    """Upsample the source [B, C, h, w] with kernels computed from the arguments ``made``; returns features or codes."""
    B, C, h, w = source.shape
    rows, columns = axis_tables(geometry, h, w, source.dtype, source.device)
    made |= {
        "source": by_pixel(source),
        "rows": rows,
        "columns": columns,
        "row_kinds": rows.shape[0],
        "column_kinds": columns.shape[0],
        "C": C,
        "C_BLOCK": channel_block(C, source.dtype),
        "PRECISION": precision(source.dtype),
    }
    if quantization is None:
        output = source.new_empty(B, 2 * h, 2 * w, C)
        _run(geometry, source.dtype, B, 2 * h, 2 * w, OUTPUT="features", output=output, **made)
        return output.permute(0, 3, 1, 2)
    not_finite, clipped = (torch.zeros(B, dtype=torch.int32, device=source.device) for _ in range(2))
    codes = Codes(source.new_empty(B, C, 2 * h, 2 * w, dtype=torch.int8), not_finite, clipped)
    # float32 features are divided, as in the reference; for half features, a product is accurate enough.
    step = quantization.step if source.dtype == torch.float32 else quantization.step.reciprocal()
    made |= {"step": step.contiguous(), "offset": quantization.offset.contiguous()}
    made |= {"output": codes.codes, "not_finite": not_finite, "clipped": clipped}
    _run(geometry, source.dtype, B, 2 * h, 2 * w, OUTPUT="codes", **made)
    return codes


def _run(geometry: Geometry, dtype: torch.dtype, B: int, H: int, W: int, **arguments: Any) -> None:
    unused: dict[str, Any] = dict.fromkeys(run_tiles.arg_names[: run_tiles.arg_names.index("RADIUS")])
    common = {"H": H, "W": W, "EXACT": dtype == torch.float32, "KERNEL_PRECISION": precision(dtype)}
    launch(run_tiles, geometry.grid(B, H, W), geometry, dtype, **(unused | common | arguments))
