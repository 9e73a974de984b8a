"""How the Triton kernels of joint bilateral upsampling are launched: layouts, precision, blocks, warps, registers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jbu.triton.cache import ensure_cache
from kernels.jbu.triton.geometry import Geometry, power_of_two

__all__ = ["by_pixel", "channel_block", "launch", "options", "padded", "padded_keys", "precision", "strides"]


def launch(kernel: Any, grid: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, /, **arguments: Any) -> None:
    """Run a kernel's programs.

    Args:
        kernel: compiled for a geometry; its arguments include those of `Geometry.constants`.
        grid: how many programs, along up to three axes.
        geometry: of the kernels of joint bilateral upsampling.
        dtype: of the matrices it multiplies.
        arguments: all others, by name.
    """
    ensure_cache()
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device
        kernel[grid](**arguments, **geometry.constants(), **options(geometry, dtype, arguments))


def options(geometry: Geometry, dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a kernel is compiled with. Constants, and no tuning at run time: results would depend on timings.

    Chosen by what ptxas says for sm_90, radius 3; not yet by timings. Half: 4 warps, as a patch is one warp's rows of a
    matrix instruction and a tile has 4. Left alone a learned stage takes 227 registers a thread; at 168 it spills next
    to none, and 3 programs fit a multiprocessor. float32 in three parts needs twice that: 8 warps, and 128 registers,
    where it spills some but 2 programs fit. From radius 4 on all of them, 255, are needed.
    """
    wide = dtype == torch.float32
    loops = (arguments.get("C") or 0) > (arguments.get("C_BLOCK") or 0)  # else a second buffer for loads would lie idle
    return {
        "num_warps": 8 if wide else 4,
        "num_stages": 2 if loops else 1,
        "maxnreg": (128 if wide else 168) if geometry.radius < 4 else None,
        "enable_fp_fusion": True,  # Triton's default, which it warns about
    }


def channel_block(channels: int, dtype: torch.dtype) -> int:
    """How many channels a program weighs at a time: for 128 half ones, all; else what leaves room to load the next."""
    block = max(16, power_of_two(channels))
    if dtype == torch.float32:
        return min(block, 32)
    return block if block <= 128 else 64


def precision(dtype: torch.dtype, result: torch.dtype | None = None) -> str:
    """How matrices of a dtype are multiplied: float32 as three products of tf32, or as one if the result is half.

    Args:
        dtype: of the matrices.
        result: dtype of what is computed in the end; theirs if None.
    """
    return "tf32x3" if (result or dtype) == torch.float32 else "tf32"


def by_pixel(image: Tensor) -> Tensor:
    """[B, C, H, W] in any layout -> [B, H, W, C], contiguous; of channels_last a view."""
    return image.permute(0, 2, 3, 1).contiguous()


def strides(name: str, image: Tensor) -> dict[str, Any]:
    """A kernel's arguments for an image [B, C, H, W] in any layout: itself, and its strides as ``name_b`` etc."""
    return {name: image} | {f"{name}_{axis}": stride for axis, stride in zip("bcyx", image.stride(), strict=True)}


def padded(channels: int) -> int:
    """Channels of keys as the kernels take them."""
    return max(16, power_of_two(channels))


def padded_keys(keys: Tensor) -> Tensor:
    """[B, D, H, W] -> [B, H, W, padded(D)], contiguous."""
    D = keys.shape[1]
    return by_pixel(keys if padded(D) == D else F.pad(keys, [0, 0, 0, 0, 0, padded(D) - D]))
