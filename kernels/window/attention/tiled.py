"""Windowed cross-attention tile by tile, in bounded memory, in plain torch; runs on every device.

Windows follow the pixel but begin and end on whole low-res cells, so about 2h distinct row windows serve all H rows.
Columns are split into runs of the width of a cell. A run sees the union of its columns' windows, about one cell more
than each of them, with a mask. A tile is a few runs × rows that share their window: it takes two batched matrix
products and a softmax, on views of keys and values that were gathered once for these runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import Kind
from kernels.window.attention.reference import window_bounds

__all__ = ["reasons_not", "windowed_attention"]

# Size of the largest tensor of a tile, over all its images. On a CPU, tiles should fit in the cache (on one core, at
# 224 … 896 px, 1 MiB takes 1.15 times and 16 MiB 0.95 times as long as 4 MiB); a GPU needs few, large kernels.
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, this takes all that the public op accepts."""
    return []


def windowed_attention(queries: Tensor, keys: Tensor, values: Tensor, window_ratio: float) -> Tensor:
    """As `kernels.window.attention.windowed_attention`, which has checked the arguments.

    Besides the output, memory is about ten times `_TILE_BYTES`, whatever the sizes: four tensors of a tile, and the
    keys and values gathered for a strip of columns. Measured on a CPU: 12 to 53 MB for k = 64 … 384 at 448 … 1792 px.
    It is more only if a single run needs more (its values: h × cells across a window × k). If gradients are recorded,
    autograd keeps every tile.

    Args:
        queries: [B, H, W, heads, d], floating.
        keys: [B, h, w, heads, d].
        values: [B, k, h, w].
        window_ratio: greater than 0.

    Returns:
        [B, k, H, W], dtype of values.
    """
    # One image at a time on a CPU: the cache is small, and results must not depend on the batch.
    step = 1 if queries.device.type == "cpu" else len(queries)
    parts = list(zip(torch.split(queries, step), torch.split(keys, step), torch.split(values, step), strict=True))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values)):
        return torch.cat([_joined(_tiles(*part, window_ratio)) for part in parts])
    output = values.new_empty(*values.shape[:2], *queries.shape[1:3])
    for images, part in zip(torch.split(output, step), parts, strict=True):
        for rows, columns, tile in _tiles(*part, window_ratio):
            images[:, :, rows, columns] = tile
    return output


def _joined(tiles: Iterator[tuple[slice, slice, Tensor]]) -> Tensor:
    """Concatenate the tiles, for autograd: writing them into slices would copy the whole gradient for each tile."""
    strips: dict[int, list[Tensor]] = {}
    for _, columns, tile in tiles:
        strips.setdefault(columns.start, []).append(tile)
    return torch.cat([torch.cat(strip, 2) for strip in strips.values()], 3)


@dataclass(frozen=True)
class _Runs:
    """Columns split into runs of equal width, and the cells that each run sees.

    Attributes:
        width: output columns in a run; the last run may extend beyond the border.
        cells: [runs, K] int64, the cells from the first to the last that a run's columns see; repeated at the border.
        bias: [runs, width, K], −∞ for a cell outside of the column's window, else 0.
    """

    width: int
    cells: Tensor
    bias: Tensor

    @classmethod
    def of(cls, low: int, high: int, ratio: float, like: Tensor) -> "_Runs":
        starts, stops = window_bounds(low, high, ratio)
        width = math.ceil(high / low)
        missing = -high % width
        starts, stops = (torch.cat([t, t[-1:].expand(missing)]).view(-1, width) for t in (starts, stops))
        K = int((stops[:, -1] - starts[:, 0]).max())
        cells = starts[:, :1] + torch.arange(K)  # bounds never decrease: the first column has the first cell
        inside = (cells[:, None] >= starts[:, :, None]) & (cells[:, None] < stops[:, :, None])
        bias = torch.where(inside, 0.0, -torch.inf)
        return cls(width, cells.clamp(max=low - 1).to(like.device), bias.to(like))


def _tiles(queries: Tensor, keys: Tensor, values: Tensor, ratio: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows, columns and values [B, k, rows, columns] of each output tile, in strips of columns from left."""
    W, heads, d = queries.shape[2:]
    (h, w), k = keys.shape[1:3], values.shape[1]
    runs = _Runs.of(w, W, ratio, queries)
    K = runs.cells.shape[1]
    groups = _row_groups(h, queries.shape[1], ratio)
    limit = _numbers_in_a_tile(queries)
    # The largest of a pixel's scores, its query and its output decides how many rows of a run form a tile.
    pixel = max(heads * K * max(window.stop - window.start for _, window in groups), heads * d, k)
    most = max(1, limit // (runs.width * pixel))
    at_once = min(most // max(rows.stop - rows.start for rows, _ in groups), 2 * limit // (h * K * max(heads * d, k)))
    at_once = max(1, at_once)
    pieces = [
        (slice(top, min(top + most, rows.stop)), window)
        for rows, window in groups
        for top in range(rows.start, rows.stop, most)
    ]
    heights = [rows.stop - rows.start for rows, _ in pieces]
    keys, left = keys * d**-0.5, 0
    # Split, not sliced: the gradient of a slice is as large as the sliced tensor.
    strips = torch.split(queries, at_once * runs.width, 2)
    for strip, cells, bias in zip(
        strips, torch.split(runs.cells, at_once), torch.split(runs.bias, at_once), strict=True
    ):
        near_keys = _near(keys.permute(0, 3, 1, 2, 4), cells)  # [B, n, heads, h, K, d]
        near_values = _near(values[..., None], cells)[..., 0]  # [B, n, k, h, K]
        columns = slice(left, left + strip.shape[2])
        for tile, (rows, window) in zip(torch.split(strip, heights, 1), pieces, strict=True):
            yield rows, columns, _tile(tile, near_keys[:, :, :, window], near_values[:, :, :, window], bias)
        left = columns.stop


def _near(x: Tensor, cells: Tensor) -> Tensor:
    """Gather the cells [n, K] that n runs see from x [B, c, h, w, d]: [B, n, c, h, K, d], contiguous."""
    seen = x.index_select(3, cells.flatten())
    return seen.view(*x.shape[:3], *cells.shape, x.shape[4]).permute(0, 3, 1, 2, 4, 5).contiguous()


def _tile(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Compute one tile: n runs × rows that share a window of R rows of cells.

    Args:
        queries: [B, rows, columns, heads, d].
        keys: [B, n, heads, R, K, d], scaled.
        values: [B, n, k, R, K].
        bias: [n, m, K].

    Returns:
        [B, k, rows, columns].
    """
    B, rows, columns, heads, d = queries.shape
    n, m, K = bias.shape
    R, k = keys.shape[3], values.shape[2]
    if columns < n * m:
        queries = F.pad(queries, (0, 0, 0, 0, 0, n * m - columns))
    queries = queries.reshape(B, rows, n, m, heads, d).permute(0, 2, 4, 1, 3, 5)
    scores = torch.bmm(queries.reshape(B * n * heads, rows * m, d), keys.reshape(-1, R * K, d).transpose(1, 2))
    outside = bias[:, :, None].expand(n, m, R, K).reshape(n, 1, 1, m, R * K)
    scores = scores.view(B, n, heads, rows, m, R * K).add_(outside)
    working = torch.promote_types(scores.dtype, torch.float32)  # half precision cannot hold a sum of small weights
    weights = torch.softmax(scores, dim=-1, dtype=working).mean(2).to(values.dtype)  # [B, n, rows, m, R*K]
    tile = torch.bmm(values.reshape(B * n, k, R * K), weights.reshape(B * n, rows * m, R * K).transpose(1, 2))
    return tile.view(B, n, k, rows, m).permute(0, 2, 3, 1, 4).flatten(3)[..., :columns]


def _numbers_in_a_tile(queries: Tensor) -> int:
    """Number of elements that the largest tensor of a tile may have per image."""
    limit = _TILE_BYTES.get(queries.device.type, _TILE_BYTES["cuda"])
    return limit // (len(queries) * torch.promote_types(queries.dtype, torch.float32).itemsize)


def _row_groups(low: int, high: int, ratio: float) -> list[tuple[slice, slice]]:
    """Groups of output rows that share a window, each with its window of low-res rows."""
    bounds = list(zip(*(bound.tolist() for bound in window_bounds(low, high, ratio)), strict=True))
    first = [y for y in range(high) if y == 0 or bounds[y] != bounds[y - 1]]
    return [(slice(y, end), slice(*bounds[y])) for y, end in zip(first, [*first[1:], high], strict=True)]
