"""Weighted sums over windows on a CPU, in float32: loops compiled by numba, deterministic, forward and backward."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compilation import compiled
from kernels.dispatch import Kind, not_of_dtypes, not_on_cpu

__all__ = ["FORWARD_MODE", "reasons_not", "window_sum"]

FORWARD_MODE = False

_Floats = npt.NDArray[np.float32]
_Integers = npt.NDArray[np.int64]


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why this implementation cannot take inputs of these kinds; none if it can."""
    return [*not_on_cpu(kinds), *not_of_dtypes(kinds, (torch.float32,))]


def window_sum(maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As `kernels.window.sum.window_sum`, which has checked the arguments; float32 on a CPU."""
    output: Tensor = _Numba.apply(maps, weights, rows, columns)
    return output


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
