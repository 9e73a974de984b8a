"""Weighted sums over windows of feature maps: each with its own weights, at its own place, many and overlapping.

What unfolding patches and averaging them does, without the patches. On a CPU in float32 numba's loops run; elsewhere
torch's embedding bag does, which is also the definition. Both are deterministic, forward and backward.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compilation import compiled

__all__ = ["reference_window_sum", "window_sum"]

_Floats = npt.NDArray[np.float32]
_Integers = npt.NDArray[np.int64]


def window_sum(maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum the pixels of windows; differentiable in maps and weights.

    Args:
        maps: [N, H, W, c], floating.
        weights: [N, M, S, S'], in the maps' dtype, on their device: of M windows of S × S' pixels in each map.
        rows: [M] int64, where the windows begin: 0 to H - S. The same windows in all maps.
        columns: [M] int64, likewise: 0 to W - S'.

    Returns:
        [N, M, c], dtype of the maps.

    Raises:
        ValueError: the shapes do not agree, or a window leaves the maps.
    """
    _check(maps, weights, rows, columns)
    if maps.device.type == "cpu" and maps.dtype == torch.float32:
        output: Tensor = _Numba.apply(maps, weights, rows, columns)
        return output
    return reference_window_sum(maps, weights, rows, columns)


def reference_window_sum(maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As `window_sum`, in plain torch."""
    N, H, W, c = maps.shape
    M, height, width = weights.shape[1:]
    down = (rows[:, None] + torch.arange(height, device=rows.device)) * W
    across = columns[:, None] + torch.arange(width, device=rows.device)
    pixels = (down[:, :, None] + across[:, None]).flatten(1)  # [M, S·S']
    pixels = pixels + H * W * torch.arange(N, device=rows.device)[:, None, None]
    table, bags = maps.reshape(N * H * W, c), weights.reshape(N * M, height * width)
    return F.embedding_bag(pixels.flatten(0, 1), table, per_sample_weights=bags, mode="sum").view(N, M, c)


def _check(maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> None:
    if maps.ndim != 4 or weights.ndim != 4 or maps.shape[0] != weights.shape[0] or maps.dtype != weights.dtype:
        raise ValueError(
            f"weights: got {list(weights.shape)} {weights.dtype}, need [N, M, S, S'] like maps [N, H, W, c], "
            f"which are {list(maps.shape)} {maps.dtype}"
        )
    for name, first, axis in (("rows", rows, 2), ("columns", columns, 3)):
        if first.shape != (weights.shape[1],) or first.dtype != torch.int64:
            raise ValueError(f"{name}: got {list(first.shape)} {first.dtype}, need [{weights.shape[1]}] int64")
        most = maps.shape[axis - 1] - weights.shape[axis]
        # On a GPU, looking at values would wait for it; its embedding bag checks indices itself.
        if not first.is_cuda and first.numel() and (int(first.min()) < 0 or int(first.max()) > most):
            raise ValueError(f"{name}: got {int(first.min())} to {int(first.max())}, need 0 to {most}")


class _Numba(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        maps, weights = maps.contiguous(), weights.contiguous()
        ctx.save_for_backward(maps, weights, rows, columns)
        output = maps.new_zeros(len(maps), weights.shape[1], maps.shape[3])
        _sum(*(t.detach().numpy() for t in (maps, weights, rows, columns, output)))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        maps, weights, rows, columns = ctx.saved_tensors
        of_maps, of_weights = torch.zeros_like(maps), torch.empty_like(weights)
        tensors = (maps, weights, rows, columns, gradient.contiguous(), of_maps, of_weights)
        _gradients(*(t.detach().numpy() for t in tensors))
        return of_maps, of_weights, None, None


@compiled(fastmath={"contract", "reassoc"}, error_model="numpy")
def _sum(maps: _Floats, weights: _Floats, rows: _Integers, columns: _Integers, output: _Floats) -> None:
    N, M, height, width = weights.shape
    for n in range(N):
        for m in range(M):
            total = output[n, m]
            for i in range(height):
                for j in range(width):
                    weight, pixel = weights[n, m, i, j], maps[n, rows[m] + i, columns[m] + j]
                    for c in range(pixel.shape[0]):
                        total[c] += weight * pixel[c]


@compiled(fastmath={"contract", "reassoc"}, error_model="numpy")
def _gradients(
    maps: _Floats,
    weights: _Floats,
    rows: _Integers,
    columns: _Integers,
    gradient: _Floats,
    of_maps: _Floats,
    of_weights: _Floats,
) -> None:
    N, M, height, width = weights.shape
    for n in range(N):
        for m in range(M):
            given = gradient[n, m]
            for i in range(height):
                for j in range(width):
                    row, column = rows[m] + i, columns[m] + j
                    pixel, of_pixel, weight = maps[n, row, column], of_maps[n, row, column], weights[n, m, i, j]
                    dot = np.float32(0)
                    for c in range(given.shape[0]):
                        dot += given[c] * pixel[c]
                    for c in range(given.shape[0]):
                        of_pixel[c] += weight * given[c]
                    of_weights[n, m, i, j] = dot
