"""Launch the Triton kernels of joint bilateral upsampling: layouts, precision, blocks, warps, registers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.cache import ensure_cache
from kernels.jbu.triton.geometry import Geometry, power_of_two

__all__ = ["by_pixel", "channel_block", "launch", "options", "padded", "padded_keys", "strides"]


def launch(kernel: Any, grid: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, /, **arguments: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: a Triton kernel; its arguments include those of `Geometry.constants`.
        grid: number of programs along up to three axes.
        geometry: geometry that the kernel is compiled for.
        dtype: dtype of the matrices that it multiplies.
        arguments: all other arguments, by name.
    """
    ensure_cache()
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device
        kernel[grid](**arguments, **geometry.constants(), **options(geometry, dtype, arguments))


def options(geometry: Geometry, dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compilation options of a kernel. They are constants, as results of tuning at run time would depend on timings.

    They were chosen by the output of ptxas for sm_90 and radius 3, not yet by timings. Half precision: 4 warps, because
    a patch is one warp's rows of a matrix instruction, and a tile has 4 patches. Without a limit, a learned stage uses
    227 registers per thread; with 168 it spills almost none, and 3 programs fit on a multiprocessor. float32 in three
    parts needs twice as many: 8 warps with 128 registers, which spill some, but 2 programs fit. From radius 4 on, all
    255 registers are needed.
    """
    wide = dtype == torch.float32
    loops = (arguments.get("C") or 0) > (arguments.get("C_BLOCK") or 0)  # else a second load buffer would be unused
    return {
        "num_warps": 8 if wide else 4,
        "num_stages": 2 if loops else 1,
        "maxnreg": (128 if wide else 168) if geometry.radius < 4 else None,
        "enable_fp_fusion": True,  # the default, which Triton warns about
    }


def channel_block(channels: int, dtype: torch.dtype) -> int:
    """Channels per iteration of a program: all of up to 128 half ones; otherwise few enough to prefetch the next."""
    block = max(16, power_of_two(channels))
    if dtype == torch.float32:
        return min(block, 32)
    return block if block <= 128 else 64


def by_pixel(image: Tensor) -> Tensor:
    """[B, C, H, W] in any layout -> [B, H, W, C], contiguous; a view if the image is channels_last."""
    return image.permute(0, 2, 3, 1).contiguous()


def strides(name: str, image: Tensor) -> dict[str, Any]:
    """Kernel arguments for an image [B, C, H, W] in any layout: the image, and its strides as ``name_b`` etc."""
    return {name: image} | {f"{name}_{axis}": stride for axis, stride in zip("bcyx", image.stride(), strict=True)}


def padded(channels: int) -> int:
    """Number of key channels in the Triton kernels: a power of two, at least 16."""
    return max(16, power_of_two(channels))


def padded_keys(keys: Tensor) -> Tensor:
    """[B, D, H, W] -> [B, H, W, padded(D)], contiguous."""
    D = keys.shape[1]
    return by_pixel(keys if padded(D) == D else F.pad(keys, [0, 0, 0, 0, 0, padded(D) - D]))
