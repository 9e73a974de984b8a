"""Baseline for `benchmarks.kernels.jbu`: JBU computed as in FeatUp's code, reimplemented.

The range kernel comes from an unfolded tensor of all keys' neighbours, the 49 filters of every pixel are materialised,
the source is upsampled bicubically and padded in memory, and the adaptive convolution is one launch per image with one
thread per output value. On a CPU, which FeatUp's kernel does not support, numba compiles the same loops.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jbu import JBUStage
from kernels.jbu.parameters import StageParameters

FIXUP_WEIGHT = 0.1


def featup_stage(source: Tensor, guidance: Tensor, stage: JBUStage) -> Tensor:
    """source [B, C, h, w], guidance [B, 3, 2h, 2w] -> [B, C, 2h, 2w]; differentiable."""
    filters = _filters(guidance, StageParameters.of(stage))  # [B, H, W, n, n]
    high = F.interpolate(source, scale_factor=2, mode="bicubic", align_corners=False)
    padded = F.pad(high, [stage.radius] * 4, mode="reflect")
    images = [
        _AdaptiveConv.apply(*pair) for pair in zip(padded.split(1), filters.to(source.dtype).split(1), strict=True)
    ]
    return torch.cat(images)


def _filters(guidance: Tensor, stage: StageParameters) -> Tensor:
    B, _, H, W = guidance.shape
    n = 2 * stage.radius + 1
    keys = stage.keys(guidance)
    padded = F.pad(keys, [stage.radius] * 4, mode="reflect")
    neighbours = F.unfold(padded, n).view(B, keys.shape[1], n * n, H, W)
    products = torch.einsum("bdthw,bdhw->bthw", neighbours, keys)
    range_kernel = torch.softmax(stage.range_temp.exp().clamp(1e-4, 1e4) * products, dim=1)
    x = torch.linspace(-1, 1, n, dtype=guidance.dtype, device=guidance.device)
    spatial = torch.exp(-(x[:, None].square() + x.square()) / (2 * stage.sigma_spatial.square())).reshape(1, -1, 1, 1)
    kernel = range_kernel * spatial
    kernel = kernel / kernel.sum(1, keepdim=True).clamp_min(1e-7)
    kernel = kernel + FIXUP_WEIGHT * stage.fixup(torch.cat([kernel, guidance], 1))
    return kernel.permute(0, 2, 3, 1).reshape(B, H, W, n, n).contiguous()


class _AdaptiveConv(torch.autograd.Function):
    """padded [1, C, H+2r, W+2r], filters [1, H, W, n, n] -> [1, C, H, W]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(padded, filters)
        _, H, W, *_ = filters.shape
        output = padded.new_empty(1, padded.shape[1], H, W)
        _loops(padded.device.type)["forward"](padded, filters, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        padded, filters = ctx.saved_tensors
        of_padded, of_filters = torch.empty_like(padded), torch.empty_like(filters)
        loops = _loops(padded.device.type)
        loops["of_padded"](gradient.contiguous(), filters, of_padded)
        loops["of_filters"](gradient.contiguous(), padded, of_filters)
        return of_padded, of_filters


@functools.cache
def _loops(device: str) -> dict[str, Callable[..., None]]:
    return _cuda_loops() if device == "cuda" else _cpu_loops()


def _cpu_loops() -> dict[str, Callable[..., None]]:
    from numba import njit

    @njit(nogil=True, fastmath={"contract"})
    def forward(padded: Any, filters: Any, output: Any) -> None:
        _, C, H, W = output.shape
        n = filters.shape[3]
        for c in range(C):
            for y in range(H):
                for x in range(W):
                    total = padded.dtype.type(0)
                    for a in range(n):
                        for b in range(n):
                            total += filters[0, y, x, a, b] * padded[0, c, y + a, x + b]
                    output[0, c, y, x] = total

    @njit(nogil=True, fastmath={"contract"})
    def of_padded(gradient: Any, filters: Any, output: Any) -> None:
        _, C, H, W = gradient.shape
        n = filters.shape[3]
        output[:] = 0
        for c in range(C):
            for y in range(H):
                for x in range(W):
                    for a in range(n):
                        for b in range(n):
                            output[0, c, y + a, x + b] += filters[0, y, x, a, b] * gradient[0, c, y, x]

    @njit(nogil=True, fastmath={"contract"})
    def of_filters(gradient: Any, padded: Any, output: Any) -> None:
        _, C, H, W = gradient.shape
        n = output.shape[3]
        output[:] = 0
        for c in range(C):
            for y in range(H):
                for x in range(W):
                    for a in range(n):
                        for b in range(n):
                            output[0, y, x, a, b] += gradient[0, c, y, x] * padded[0, c, y + a, x + b]

    def on_arrays(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *tensors: function(*(tensor.detach().numpy() for tensor in tensors))

    return {"forward": on_arrays(forward), "of_padded": on_arrays(of_padded), "of_filters": on_arrays(of_filters)}


def _cuda_loops() -> dict[str, Callable[..., None]]:
    from benchmarks.kernels import jbu_peers_triton as kernels

    def forward(padded: Tensor, filters: Tensor, output: Tensor) -> None:
        _, C, H, W = output.shape
        kernels.forward[kernels.grid(output)](padded, filters, output, C, H, W, n=filters.shape[3], BLOCK=256)

    def of_padded(gradient: Tensor, filters: Tensor, output: Tensor) -> None:
        _, C, H, W = gradient.shape
        kernels.of_padded[kernels.grid(output)](gradient, filters, output, C, H, W, n=filters.shape[3], BLOCK=256)

    def of_filters(gradient: Tensor, padded: Tensor, output: Tensor) -> None:
        _, C, H, W = gradient.shape
        n = math.isqrt(output[0, 0, 0].numel())
        kernels.of_filters[kernels.grid(output)](gradient, padded, output, C, H, W, n=n, BLOCK=256)

    return {"forward": forward, "of_padded": of_padded, "of_filters": of_filters}
