"""Weighted sums over many overlapping windows of feature maps, each with its own weights and position.

This equals unfolding patches and averaging them, without storing the patches. This module has the public operation;
`kernels.window.sum.reference` is the definition.
"""

import torch
from torch import Tensor

from kernels import dispatch

__all__ = ["window_sum"]


def window_sum(
    maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Compute weighted sums of the pixels of windows; differentiable in maps and weights.

    Args:
        maps: [N, H, W, c], floating.
        weights: [N, M, S, S'], in the maps' dtype, on their device: weights of M windows of S × S' pixels in each map.
        rows: [M] int64, first row of each window: 0 to H - S. The windows are the same in all maps.
        columns: [M] int64, first column of each window: 0 to W - S'.
        implementation: "cpu" (float32 on a CPU) or "reference" (any); None picks the first that can
            (`kernels.dispatch`).

    Returns:
        [N, M, c], dtype of the maps.

    Raises:
        ValueError: the shapes or dtypes do not agree, a window exceeds the maps (not checked on a GPU), or the selected
            implementation cannot take these inputs.
    """
    _check(maps, weights, rows, columns)
    chosen = dispatch.choose("window_sum", implementation, maps, weights)
    output: Tensor = dispatch.implementation("window_sum", chosen).window_sum(maps, weights, rows, columns)
    return output


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
        # On a GPU, reading values would synchronize; its embedding bag checks indices itself.
        if not first.is_cuda and first.numel() and (int(first.min()) < 0 or int(first.max()) > most):
            raise ValueError(f"{name}: got {int(first.min())} to {int(first.max())}, need 0 to {most}")
