"""Neighbourhood attention across scales, as published: the definition.

Keys and values are upsampled to the queries' size, and every pixel attends to a dilated window of them. Everything here
is differentiable and runs in any floating dtype on any device. Memory: a few tensors of the queries' size; with
gradients, autograd keeps two more for each cell of a window.
"""

from collections.abc import Iterator, Sequence

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
    low = values.to(working).permute(0, 2, 3, 1).reshape(len(values), h, w, heads, -1)
    keys, high = (_upsampled(x, H, W) for x in (keys.to(working), low))  # [B, H, W, heads, d or K/heads]
    rows, columns = (window_places(*sizes, window).to(keys.device) for sizes in ((h, H), (w, W)))
    scores = torch.stack([(queries.to(working) * key).sum(4) for key in _taps(keys, rows, columns)]) / d**0.5
    weights = torch.softmax(scores, 0)  # [taps, B, H, W, heads]
    output = torch.zeros_like(high)
    for weight, value in zip(weights, _taps(high, rows, columns), strict=True):
        output = output + weight[..., None] * value
    output = output.sum(3) if sum_heads else output.flatten(3)
    return output.permute(0, 3, 1, 2).to(values.dtype).contiguous()


def neighborhood_codes(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, quantization: Quantization
) -> Codes:
    """As `kernels.window.neighborhood.neighborhood_codes`."""
    return quantized(neighborhood_attention(queries, keys, values, window, sum_heads), quantization)


def _upsampled(low: Tensor, H: int, W: int) -> Tensor:
    """Upsample [B, h, w, heads, c] to [B, H, W, heads, c]: the nearest cell, by the distance of centres."""
    high = F.interpolate(low.flatten(3).permute(0, 3, 1, 2), (H, W), mode="nearest-exact")
    return high.permute(0, 2, 3, 1).reshape(len(low), H, W, *low.shape[3:])


def _taps(high: Tensor, rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield, for each place of the window, what each pixel of [B, H, W, ...] sees there."""
    for down in rows:
        row = high.index_select(1, down)
        yield from (row.index_select(2, across) for across in columns)
