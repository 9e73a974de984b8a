"""FeatUp's attention downsampler applied to jittered views, computed on the image's own pixels.

FeatUp (arXiv 2403.10516, section 3.2): a view of the features is blurred and cut into overlapping cells, and each cell
is averaged with weights that are a softmax of its saliency. View and blur are separable linear maps of the image, so a
cell is a window of the image, transformed by two small matrices. The weights are mapped back through these matrices to
the window, where the features are summed: neither views of all channels nor their patches are ever materialised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.window.sum import window_sum
from pipeline.views.downsample import blur_matrix
from pipeline.views.jitter import Jitter, view_matrices
from pipeline.views.published import ATTENTION_NOISE, BLUR_TAPS

__all__ = ["AttentionDownsamplers", "DownsamplerDropout", "Windows"]

_VIEWS_AT_ONCE = 64  # views whose matrices are built at a time: 50 MB in float64


@dataclass(frozen=True)
class Windows:
    """The cells of V views: the window of the image that each covers, and the matrices between them.

    Attributes:
        rows: [V, h, cell, S] float32, map the S rows of each window to the rows of its cell.
        first_row: [V, h] int64, first row of each window.
        columns: [V, w, cell, S'] float32, likewise for columns.
        first_column: [V, w] int64, first column of each window.
        size: (H, W) of the image.
    """

    rows: Tensor
    first_row: Tensor
    columns: Tensor
    first_column: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, jitters: Sequence[Jitter], grid: tuple[int, int], cell_px: int, device: torch.device) -> "Windows":
        """Compute the windows of views.

        Args:
            jitters: the views, all of one image size.
            grid: (h, w) of the backbone's features.
            cell_px: side of a cell, in pixels of a view.
            device: device of the result.

        Raises:
            ValueError: the cells do not fit in the image.
        """
        size = jitters[0].size
        strides = [_stride(length, cells, cell_px) for length, cells in zip(size, grid, strict=True)]
        parts: list[tuple[Tensor, ...]] = []
        for first in range(0, len(jitters), _VIEWS_AT_ONCE):
            rows, columns = view_matrices(jitters[first : first + _VIEWS_AT_ONCE], size)
            axes = zip((rows, columns), grid, strides, strict=True)
            parts.append(sum((_windows(view, cells, cell_px, stride) for view, cells, stride in axes), ()))
        rows, first_row, columns, first_column = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
        return cls(rows, first_row, columns, first_column, size)

    def __getitem__(self, chosen: Tensor | slice) -> "Windows":
        """The windows of the chosen views."""
        first_row, first_column = self.first_row[chosen], self.first_column[chosen]
        return Windows(self.rows[chosen], first_row, self.columns[chosen], first_column, self.size)

    def starts(self) -> tuple[Tensor, Tensor]:
        """First row and first column of each window: two tensors [V·h·w] int64."""
        V, h, w = len(self.rows), self.first_row.shape[1], self.first_column.shape[1]
        rows, columns = self.first_row[:, :, None], self.first_column[:, None]
        return rows.expand(V, h, w).flatten(), columns.expand(V, h, w).flatten()

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same matrices over the whole image: rows [V, h·cell, H] and columns [V, w·cell, W]."""
        rows = _spread(self.rows, self.first_row, self.size[0])
        return rows, _spread(self.columns, self.first_column, self.size[1])


@dataclass(frozen=True)
class DownsamplerDropout:
    """Dropout of one step, the same for all images.

    Attributes:
        channels: [V, c] floating, factors on the channels that saliency is computed from: 0 if dropped, else the
            rescaling. Published dropout is also drawn per pixel; per channel, saliency remains a single-channel map.
        cells: [V, h, w] floating, 1 where saliency is used, 0 where it is dropped.
    """

    channels: Tensor
    cells: Tensor


class AttentionDownsamplers(nn.Module):
    """N downsamplers, one per image.

    Args:
        images: N.
        num_chs: c, channels of the maps to downsample.
        cell_px: side of a cell in pixels.
        seed: for the initial values, which are the same for every image.
    """

    def __init__(self, images: int, num_chs: int, cell_px: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def stacked(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.repeat(images, *[1] * values.ndim))

        bound = num_chs**-0.5  # PyTorch's initialisation of a linear layer
        self.saliency_weight = stacked((2 * torch.rand(num_chs, generator=generator) - 1) * bound)
        self.saliency_bias = stacked((2 * torch.rand((), generator=generator) - 1) * bound)
        self.weight = stacked(1 + ATTENTION_NOISE * torch.randn(cell_px, cell_px, generator=generator))
        self.bias = stacked(ATTENTION_NOISE * torch.randn(cell_px, cell_px, generator=generator))

    def forward(self, maps: Tensor, windows: Windows, dropout: DownsamplerDropout | None = None) -> Tensor:
        """Downsample V views of each image's features.

        Args:
            maps: [N, H·W, c] float32.
            windows: the views' windows, the same for all images.
            dropout: dropout of this step; None for none.

        Returns:
            [N, V, h, w, c] float32.
        """
        N, _, c = maps.shape
        V, h, w = windows.rows.shape[0], windows.rows.shape[1], windows.columns.shape[1]
        attention = self._attention(maps, windows, dropout)  # [N, V, h, w, cell, cell]
        pulled = torch.einsum("vias,nvijab->nvijsb", windows.rows, attention)
        pulled = torch.einsum("nvijsb,vjbt->nvijst", pulled, windows.columns)  # [N, V, h, w, S, S']
        rows, columns = windows.starts()
        low = window_sum(maps.view(N, *windows.size, c), pulled.flatten(1, 3), rows, columns)
        return low.view(N, V, h, w, c)

    def _attention(self, maps: Tensor, windows: Windows, dropout: DownsamplerDropout | None) -> Tensor:
        """Weights [N, V, h, w, cell, cell], non-negative, summing to 1 over each cell."""
        N, cell = len(maps), self.weight.shape[1]
        direction = self.saliency_weight[:, :, None]  # [N, c, 1]
        if dropout is not None:
            direction = direction * dropout.channels.T
        salient = (maps @ direction).mT.reshape(N, -1, *windows.size)  # [N, V or 1, H, W]
        rows, columns = windows.dense()
        logits = rows @ salient @ columns.mT + self.saliency_bias[:, None, None, None]
        split = logits.view(N, len(rows), rows.shape[1] // cell, cell, columns.shape[1] // cell, cell)
        logits = split.transpose(3, 4)  # [N, V, h, w, cell, cell]
        if dropout is not None:
            logits = logits * dropout.cells[..., None, None]
        logits = logits * self.weight[:, None, None, None] + self.bias[:, None, None, None]
        return logits.flatten(4).softmax(4).reshape(logits.shape)


def _stride(length: int, cells: int, cell_px: int) -> int:
    """Pixels between the starts of cells, as published: the remainder at the end is ignored."""
    if cell_px + cells - 1 > length:
        raise ValueError(f"cell_px: got {cell_px} pixels for {cells} cells, need at most {length + 1 - cells}")
    return (length - cell_px) // (cells - 1) if cells > 1 else length


def _windows(view: Tensor, cells: int, cell_px: int, stride: int) -> tuple[Tensor, Tensor]:
    """[V, length, length] -> matrices [V, cells, cell, S] float32 and the windows' starts [V, cells]."""
    length = view.shape[1]
    # A cell, the reach of its blur, and the second pixel of an interpolation; zoom and reflection only shrink it.
    window = min(length, cell_px + BLUR_TAPS)
    blurred = blur_matrix(length, taps=BLUR_TAPS) @ view
    starts = stride * torch.arange(cells)
    pieces = blurred[:, starts[:, None] + torch.arange(cell_px)]  # [V, cells, cell, length]
    first = (pieces != 0).any(2).int().argmax(2).clamp(max=length - window)  # [V, cells]
    inside = first[:, :, None, None] + torch.arange(window)
    return pieces.gather(3, inside.expand(-1, -1, cell_px, -1)).float(), first


def _spread(pieces: Tensor, first: Tensor, length: int) -> Tensor:
    """Scatter windows' matrices [V, cells, cell, S] over the whole axis -> [V, cells·cell, length]."""
    inside = first[:, :, None, None] + torch.arange(pieces.shape[3], device=pieces.device)
    dense = pieces.new_zeros(*pieces.shape[:3], length)
    return dense.scatter_(3, inside.expand(pieces.shape), pieces).flatten(1, 2)
