"""Weighted sums over windows in plain torch: the definition, for any floating dtype on any device; also used on GPUs.

It uses torch's embedding bag, which is deterministic, forward and backward.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import Kind

__all__ = ["reasons_not", "window_sum"]


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, the reference takes all that the public op accepts."""
    return []


def window_sum(maps: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As `kernels.window.sum.window_sum`, which has checked the arguments."""
    N, H, W, c = maps.shape
    M, height, width = weights.shape[1:]
    down = (rows[:, None] + torch.arange(height, device=rows.device)) * W
    across = columns[:, None] + torch.arange(width, device=rows.device)
    pixels = (down[:, :, None] + across[:, None]).flatten(1)  # [M, S·S']
    pixels = pixels + H * W * torch.arange(N, device=rows.device)[:, None, None]
    table, bags = maps.reshape(N * H * W, c), weights.reshape(N * M, height * width)
    return F.embedding_bag(pixels.flatten(0, 1), table, per_sample_weights=bags, mode="sum").view(N, M, c)
