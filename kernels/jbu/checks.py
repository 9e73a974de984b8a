"""Argument checks of the operations of `kernels.jbu`: a ValueError names the argument, what it got and needs."""

import math

import torch
from torch import Tensor

from kernels.dtypes import FLOATING
from kernels.jbu.parameters import JBUStage, StageParameters
from kernels.quantization import Quantization

__all__ = [
    "check_adaptive_conv",
    "check_bilateral",
    "check_quantization",
    "check_stage",
    "checked_parameters",
]


_DTYPES = " or ".join(", ".join(map(str, FLOATING)).replace("torch.", "").rsplit(", ", 1))
_SIGMAS = 1e-30, 1e30  # beyond, float32 cannot represent distances in units of sigma


def check_adaptive_conv(source: Tensor, kernel: Tensor) -> None:
    """Check source [B, C, h, w] and kernel [B, n*n, 2h, 2w] of `adaptive_conv_upsample2x`."""
    _check_image("source", source)
    _check_image("kernel", kernel)
    _check_same("kernel", kernel, "source", source)
    B, _, h, w = source.shape
    taps = kernel.shape[1]
    n = math.isqrt(taps)
    if n * n != taps or n % 2 == 0:
        raise ValueError(f"kernel: got {taps} channels, need n*n taps with n odd: 1, 9, 25, 49, …")
    if kernel.shape != (B, taps, 2 * h, 2 * w):
        raise ValueError(
            f"kernel: got shape {tuple(kernel.shape)}, need {(B, taps, 2 * h, 2 * w)}: the batch of source "
            f"{tuple(source.shape)} and twice its size"
        )
    _check_reflects("source", "twice its size", 2 * h, 2 * w, n // 2)


def checked_parameters(guidance: Tensor, stage: JBUStage) -> StageParameters:
    """Check guidance [B, G, H, W] and parameters of a learned stage; returns the parameters."""
    _check_image("guidance", guidance)
    if not isinstance(stage, JBUStage):
        raise ValueError(f"stage: got {type(stage).__name__}, need a JBUStage")
    for parameter in stage.parameters():
        _check_same("stage", parameter, "guidance", guidance)
    if guidance.shape[1] != stage.guidance_dim:
        raise ValueError(f"guidance: got {guidance.shape[1]} channels, need the stage's {stage.guidance_dim}")
    _check_reflects("guidance", "its size", guidance.shape[2], guidance.shape[3], stage.radius)
    return StageParameters.of(stage)


def check_bilateral(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int) -> None:
    """Check guidance [B, G, H, W] and parameters of a training-free kernel."""
    _check_image("guidance", guidance)
    for name, sigma in (("sigma_spatial", sigma_spatial), ("sigma_range", sigma_range)):
        if not (isinstance(sigma, float | int) and _SIGMAS[0] <= sigma <= _SIGMAS[1]):
            raise ValueError(f"{name}: got {sigma!r}, need a number from {_SIGMAS[0]:g} to {_SIGMAS[1]:g}")
    if not (isinstance(radius, int) and radius >= 1):
        raise ValueError(f"radius: got {radius!r}, need an integer, at least 1")
    _check_reflects("guidance", "its size", guidance.shape[2], guidance.shape[3], radius)


def check_stage(source: Tensor, guidance: Tensor) -> None:
    """Check source [B, C, h, w] and guidance [B, G, 2h, 2w] of a whole stage."""
    _check_image("source", source)
    B, _, h, w = source.shape
    if (guidance.shape[0], *guidance.shape[2:]) != (B, 2 * h, 2 * w):
        raise ValueError(
            f"guidance: got shape {tuple(guidance.shape)}, need [{B}, {guidance.shape[1]}, {2 * h}, {2 * w}]: the "
            f"batch of source {tuple(source.shape)} and twice its size"
        )
    if guidance.dtype not in (source.dtype, torch.float32) or guidance.device != source.device:
        raise ValueError(
            f"guidance: got {guidance.dtype} on {guidance.device}, need source's {source.dtype}, or float32, on "
            f"{source.device}"
        )


def check_quantization(quantization: Quantization, source: Tensor) -> None:
    """Check steps and offsets for the channels of a source [B, C, h, w]."""
    channels = source.shape[1]
    if not isinstance(quantization, Quantization):
        raise ValueError(f"quantization: got {type(quantization).__name__}, need a Quantization")
    for name, tensor in (("step", quantization.step), ("offset", quantization.offset)):
        if tensor.shape != (channels,) or tensor.dtype != torch.float32 or tensor.device != source.device:
            raise ValueError(
                f"quantization.{name}: got shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, need "
                f"[{channels}], one per channel of source, torch.float32 on {source.device}"
            )


def _check_image(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, need a tensor")
    if tensor.ndim != 4 or tensor.dtype not in FLOATING or tensor.numel() == 0 or tensor.layout != torch.strided:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, {tensor.dtype} and {tensor.layout}, need four dimensions "
            f"[batch, channels, height, width], none of size 0, dense, in {_DTYPES}"
        )


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name}: got {tensor.dtype} on {tensor.device}, need {other_name}'s {other.dtype} on {other.device}"
        )


def _check_reflects(name: str, what: str, height: int, width: int, radius: int) -> None:
    if min(height, width) <= radius:
        raise ValueError(
            f"{name}: got {what} = {height}×{width}, need more than the radius {radius} on both axes: "
            "the border is reflected"
        )
