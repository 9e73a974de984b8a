"""Windowed cross-attention with the whole attention matrix: the definition.

Everything here is differentiable and runs in any floating dtype on any device. One matrix has heads × H·W × h·w
numbers: in float32 with 4 heads, 3.3 GB per image at 448 px over 32×32 cells, and 53 GB at 896 px over 64×64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import Kind

__all__ = ["reasons_not", "window_bounds", "windowed_attention"]


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, the reference takes all that the public op accepts."""
    return []


def window_bounds(low: int, high: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Compute which low-res cells the window of each high-res position covers, along one axis.

    AnyUp (arXiv 2510.12764, section 4): the window extends ``ratio`` of the axis to both sides of the position's
    centre, is cut at the border, and includes every cell that it touches. It is computed in float32 in exactly this
    order, as published: where a window ends exactly between two cells, rounding decides.

    Args:
        low: number of cells along the axis, at least 1.
        high: number of output positions along the axis, at least 1.
        ratio: greater than 0.

    Returns:
        First cell, and the cell after the last: two [high] int64 on the CPU, both non-decreasing. No window is empty.
    """
    centres = (torch.arange(high, dtype=torch.float32) + 0.5) / high
    starts = ((centres - ratio).clamp(0, 1) * low).floor().long()
    stops = ((centres + ratio).clamp(0, 1) * low).ceil().long()
    return starts, stops


def windowed_attention(queries: Tensor, keys: Tensor, values: Tensor, window_ratio: float) -> Tensor:
    """As `kernels.window.attention.windowed_attention`, with a mask over the whole attention matrix.

    Args:
        queries: [B, H, W, heads, d], floating.
        keys: [B, h, w, heads, d].
        values: [B, k, h, w].
        window_ratio: greater than 0.

    Returns:
        [B, k, H, W], dtype of values.
    """
    H, W, _, d = queries.shape[1:]
    h, w = keys.shape[1:3]
    scores = torch.einsum("byxnd,bijnd->bnyxij", queries, keys) / d**0.5
    rows, columns = (_inside(low, high, window_ratio).to(scores.device) for low, high in ((h, H), (w, W)))
    scores = scores.masked_fill(~(rows[:, None, :, None] & columns[None, :, None, :]), -torch.inf)
    # Half precision cannot hold the sum of many small weights.
    working = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores.flatten(4), dim=-1, dtype=working).mean(1)  # [B, H, W, h*w]
    return torch.einsum("byxs,bks->bkyx", weights.to(values.dtype), values.flatten(2))


def _inside(low: int, high: int, ratio: float) -> Tensor:
    """[high, low] bool: whether the cell is in the window of the position."""
    starts, stops = window_bounds(low, high, ratio)
    cells = torch.arange(low)
    return (cells >= starts[:, None]) & (cells < stops[:, None])
