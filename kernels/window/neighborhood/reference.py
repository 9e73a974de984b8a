"""Neighbourhood attention across scales, as published: the definition.

Keys and values are upsampled to the queries' size, and every pixel attends to a dilated window of them. Everything here
is differentiable and runs in any floating dtype on any device. Memory: a few tensors of the queries' size; with
gradients, autograd keeps two more for each cell of a window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import Kind
from kernels.quantization import Codes, Quantization, quantized

__all__ = ["neighborhood_attention", "neighborhood_codes", "reasons_not", "window_places"]


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, the reference takes all that the public op accepts."""
    return []


def window_places(low: int, high: int, window: int) -> Tensor:
    """Compute which high-res positions each high-res position attends to, along one axis.

    NATTEN's dilated neighbourhoods: with a dilation of D = high // low, positions with the same remainder modulo D form
    a sequence. The window is ``window`` neighbours in this sequence, centred where possible, else moved inwards.

    Args:
        low: number of cells along the axis, at least 1.
        high: number of positions along the axis, at least ``low``; need not be a multiple of it.
        window: odd; if ``low`` is smaller, the window has ``low`` positions.

    Returns:
        [min(window, low), high] int64, on the CPU.
    """
    position, dilation, side = torch.arange(high), high // low, min(window, low)
    rest, place = position % dilation, position // dilation
    length = (high - rest + dilation - 1) // dilation
    start = torch.minimum((place - side // 2).clamp(min=0), length - side)
    return (start + torch.arange(side)[:, None]) * dilation + rest


def neighborhood_attention(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool) -> Tensor:
    """As `kernels.window.neighborhood.neighborhood_attention`, but also for sizes that are no multiples of the grid's.

    Sums are at least float32.

    Args:
        queries: [B, H, W, heads, d], floating.
        keys: [B, h, w, heads, d].
        values: [B, K, h, w].
        window: odd.
        sum_heads: whether the heads' outputs are added, or concatenated.

    Returns:
        [B, K or K/heads, H, W], dtype of values.
    """
    H, W, heads, d = queries.shape[1:]
    h, w = keys.shape[1:3]
    working = torch.promote_types(torch.promote_types(queries.dtype, values.dtype), torch.float32)
    keys = _upsampled(keys.to(working).permute(0, 3, 4, 1, 2), H, W)  # [B, heads, d, H, W]
    high = _upsampled(values.to(working).reshape(len(values), heads, -1, h, w), H, W)  # [B, heads, K/heads, H, W]
    queries = queries.to(working).permute(0, 3, 4, 1, 2)
    rows, columns = (window_places(*sizes, window).to(keys.device) for sizes in ((h, H), (w, W)))
    taps = [(down[:, None], across) for down in rows for across in columns]
    scores = torch.stack([(queries * keys[..., down, across]).sum(2) for down, across in taps]) / d**0.5
    weights = torch.softmax(scores, 0)  # [taps, B, heads, H, W]
    output = torch.zeros_like(high)
    for weight, (down, across) in zip(weights, taps, strict=True):
        output = output + weight[:, :, None] * high[..., down, across]
    return (output.sum(1) if sum_heads else output.flatten(1, 2)).to(values.dtype)


def neighborhood_codes(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, quantization: Quantization
) -> Codes:
    """As `kernels.window.neighborhood.neighborhood_codes`."""
    return quantized(neighborhood_attention(queries, keys, values, window, sum_heads), quantization)


def _upsampled(low: Tensor, H: int, W: int) -> Tensor:
    """Upsample [B, heads, c, h, w] to H × W: the nearest cell, by the distance of centres."""
    high = F.interpolate(low.flatten(1, 2), (H, W), mode="nearest-exact")
    return high.view(*low.shape[:3], H, W)
