"""Neighbourhood attention across scales on a CPU, in plain torch: matrix products per cell, in bounded memory.

All pixels of a cell share their window, so keys and values are never upsampled. A tile is some cells of one row of
cells, or some rows of pixels of one cell. It takes a batched product of queries and keys, a softmax, and a batched
product with the values. Differentiable; autograd then keeps every tile.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.dispatch import Kind, not_on_cpu
from kernels.quantization import Codes, Encoding, Quantization

__all__ = ["FORWARD_MODE", "neighborhood_attention", "neighborhood_codes", "reasons_not"]

FORWARD_MODE = False

# Size of a tile's scores; a tile has about three tensors of this size.
_TILE_BYTES = 1 << 20


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why this implementation cannot take inputs of these kinds; none if it can."""
    return not_on_cpu(kinds)


def neighborhood_attention(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool) -> Tensor:
    """As `kernels.window.neighborhood.neighborhood_attention`, which has checked the arguments."""
    # Image by image, so that results do not depend on the batch.
    images = list(zip(queries, keys, values, strict=True))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values)):
        return torch.stack([_joined(_tiles(*image, window, sum_heads)) for image in images])
    output = values.new_empty(len(values), _channels(queries, values, sum_heads), *queries.shape[1:3])
    for made, image in zip(output, images, strict=True):
        for rows, columns, tile in _tiles(*image, window, sum_heads):
            made[:, rows, columns] = tile
    return output


def neighborhood_codes(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, quantization: Quantization
) -> Codes:
    """As `kernels.window.neighborhood.neighborhood_codes`, which has checked the arguments."""
    shape = len(values), _channels(queries, values, sum_heads), *queries.shape[1:3]
    not_finite, clipped = (torch.zeros(len(values), dtype=torch.int32) for _ in range(2))
    output = Codes(torch.empty(shape, dtype=torch.int8), not_finite, clipped)
    encoding = Encoding(quantization.step)
    for number, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        for rows, columns, tile in _tiles(query, key, value, window, sum_heads):
            codes = encoding.encode(tile[None], quantization.offset)
            output.codes[number, :, rows, columns] = codes.codes[0]
            not_finite[number] += codes.not_finite[0]
            clipped[number] += codes.clipped[0]
    return output


def _joined(tiles: Iterator[tuple[slice, slice, Tensor]]) -> Tensor:
    """Concatenate the tiles, for autograd: writing them into slices would copy the whole gradient for each tile."""
    strips: dict[int, list[Tensor]] = {}
    for rows, _, tile in tiles:
        strips.setdefault(rows.start, []).append(tile)
    return torch.cat([torch.cat(strip, 2) for strip in strips.values()], 1)


def _channels(queries: Tensor, values: Tensor, sum_heads: bool) -> int:
    return values.shape[1] // queries.shape[3] if sum_heads else values.shape[1]


def _tiles(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows, columns and output [K or K/heads, rows, columns] of each tile of one image.

    Args:
        queries: [H, W, heads, d].
        keys: [h, w, heads, d].
        values: [K, h, w].
        window: odd.
        sum_heads: whether to add the heads' outputs.
    """
    (H, W, heads, d), (h, w) = queries.shape, keys.shape[:2]
    down, across = H // h, W // w
    R, S = min(window, h), min(window, w)
    keys = (keys * d**-0.5).permute(2, 0, 1, 3).contiguous()  # [heads, h, w, d]
    values = values.reshape(heads, -1, h, w).permute(0, 2, 3, 1).contiguous()  # [heads, h, w, K/heads]
    starts = (torch.arange(w) - window // 2).clamp(min=0, max=w - S)
    near = starts[:, None] + torch.arange(S)  # [w, S]
    limit = _TILE_BYTES // (heads * across * R * S * torch.promote_types(queries.dtype, torch.float32).itemsize)
    cells, height = max(1, limit // down), max(1, min(down, limit))
    for i in range(h):
        top = min(max(i - window // 2, 0), h - R)
        for left in range(0, w, cells):
            seen = near[left : left + cells]
            near_keys, near_values = (_windows(x[:, top : top + R], seen) for x in (keys, values))
            columns = slice(left * across, (left + len(seen)) * across)
            for first in range(i * down, (i + 1) * down, height):
                rows = slice(first, min(first + height, (i + 1) * down))
                yield rows, columns, _tile(queries[rows, columns], near_keys, near_values, sum_heads)


def _windows(x: Tensor, columns: Tensor) -> Tensor:
    """Gather the windows of n cells: x [heads, R, w, c], columns [n, S] -> [heads, n, R·S, c]."""
    seen = x[:, :, columns]  # [heads, R, n, S, c]
    return seen.transpose(1, 2).flatten(2, 3)


def _tile(queries: Tensor, keys: Tensor, values: Tensor, sum_heads: bool) -> Tensor:
    """Compute one tile.

    Args:
        queries: [rows, columns, heads, d], of n cells side by side.
        keys: [heads, n, T, d], scaled.
        values: [heads, n, T, c].
        sum_heads: whether to add the heads' outputs.

    Returns:
        [c or heads·c, rows, columns], dtype of values.
    """
    rows, columns = queries.shape[:2]
    heads, n, T, c = values.shape
    pixels = (
        queries.reshape(rows, n, -1, heads, keys.shape[3]).permute(3, 1, 0, 2, 4).reshape(heads * n, -1, keys.shape[3])
    )
    scores = torch.bmm(pixels, keys.flatten(0, 1).transpose(1, 2))
    working = torch.promote_types(scores.dtype, torch.float32)  # half precision cannot hold a sum of small weights
    weights = torch.softmax(scores, dim=-1, dtype=working).to(values.dtype).view(heads, n, -1, T)
    if sum_heads:
        output = torch.bmm(weights[0], values[0])
        for head in range(1, heads):
            output.baddbmm_(weights[head], values[head])
    else:
        output = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))
    output = output.view(-1, n, rows, columns // n, c)  # [1 or heads, ...]
    return output.permute(0, 4, 2, 1, 3).reshape(-1, rows, columns)
