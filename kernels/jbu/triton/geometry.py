"""Shapes and tables of the Triton kernels of joint bilateral upsampling, made on the host.

A program makes a tile of 4 × 16 output pixels (4 × 8 from radius 4) of one image. Within it, patches of 2 × 8
pixels share a window of neighbours: 16 rows of one matrix product. All sizes on the chip are powers of two.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.jbu.bicubic import WEIGHTS, first_source_pixel, margin

__all__ = ["MAX_RADIUS", "Geometry", "axis_tables", "power_of_two", "slide_tables", "squared_distances"]

MAX_RADIUS = 7  # 15 × 15 taps are 256 on the chip; at 8 they would be 1024, which no register file holds

_TILE_ROWS = 4
_PATCH_ROWS, _PATCH_COLUMNS = 2, 8
_MAX_GRID = 65535  # programs along the second and third axis of a launch
_MATRIX_DEPTH = 16  # the least number of products that a matrix instruction sums, for half operands


@dataclass(frozen=True)
class Geometry:
    """Everything about shapes that follows from the radius.

    Args:
        radius: of the kernel, in output pixels.

    Raises:
        ValueError: the radius is larger than `MAX_RADIUS`.
    """

    radius: int

    def __post_init__(self) -> None:
        if self.radius > MAX_RADIUS:
            raise ValueError(
                f"radius: got {self.radius}, implementation 'triton' goes up to {MAX_RADIUS}. "
                "Use implementation='reference'."
            )

    @property
    def width(self) -> int:
        """Taps along an axis."""
        return 2 * self.radius + 1

    @property
    def axis(self) -> int:
        """Taps along an axis on the chip. A patch's window has one row more than taps: as many, padded."""
        return max(8, power_of_two(self.width))

    @property
    def patches_across(self) -> int:
        """Patches along a tile's row. One for large radii: kernels have 256 taps, and would not fit in registers."""
        return 2 if self.radius < 4 else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of output pixels of a program."""
        return _TILE_ROWS, _PATCH_COLUMNS * self.patches_across

    @property
    def key_columns(self) -> int:
        """Columns of a patch's window of neighbours."""
        return power_of_two(_PATCH_COLUMNS + 2 * self.radius)

    @property
    def neighbours(self) -> int:
        """Pixels of a patch's window."""
        return self.axis * self.key_columns

    @property
    def margin(self) -> int:
        """As `kernels.jbu.bicubic.margin`."""
        return margin(self.radius)

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of low-res pixels that a tile weighs."""
        rows, columns = (power_of_two(size // 2 + 2 * self.margin) for size in self.tile)
        return rows, columns

    @property
    def hidden(self) -> int:
        """Hidden channels of the learned correction, on the chip."""
        return max(_MATRIX_DEPTH, power_of_two(self.width**2))

    def constants(self) -> dict[str, int]:
        """What every kernel is compiled for."""
        rows, columns = self.window
        return {
            "RADIUS": self.radius,
            "AXIS": self.axis,
            "ACROSS": self.patches_across,
            "KEY_COLUMNS": self.key_columns,
            "WINDOW_ROWS": rows,
            "WINDOW_COLUMNS": columns,
            "MARGIN": self.margin,
        }

    def grid(self, B: int, H: int, W: int) -> tuple[int, int, int]:
        """Programs for B outputs of H × W: tiles across, tiles down, images.

        Raises:
            ValueError: CUDA takes no such grid.
        """
        across, down = -(-W // self.tile[1]), -(-H // self.tile[0])
        if max(down, B) > _MAX_GRID:
            raise ValueError(
                f"output: got {B} images of {H} × {W}, need at most {_MAX_GRID} of at most "
                f"{_MAX_GRID * self.tile[0]} rows at once. Split the batch."
            )
        return across, down, B


def power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


@functools.lru_cache(maxsize=256)
def axis_tables(geometry: Geometry, h: int, w: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices that turn a tile's kernels into weights of its low-res window: bicubic ×2 and reflection, along an axis.

    Away from the border all tiles share one. Their depth is 16, which has room for more than the taps of one axis:
    each matrix is repeated along a diagonal, so that a part of the other axis comes along unchanged.

    Args:
        geometry: of the kernels.
        h: rows of the source.
        w: columns of the source.
        dtype: of the source.
        device: of the source.

    Returns:
        rows [kinds, tile rows, (tap, part), (window row, part)] and columns [kinds, tile columns, (part, tap),
        (part, window column)]. Of t tiles and k kinds, tile i is of kind i in the first half of the kinds, the last
        kinds are the last tiles, and the middle one is all others.
    """
    repeat = np.eye(_MATRIX_DEPTH // geometry.axis)
    rows = _axis_matrices(h, geometry, geometry.tile[0], geometry.window[0])
    columns = _axis_matrices(w, geometry, geometry.tile[1], geometry.window[1])
    down = np.einsum("ktas,pq->ktapsq", rows, repeat).reshape(*rows.shape[:2], _MATRIX_DEPTH, -1)
    across = np.einsum("ktas,pq->ktpaqs", columns, repeat).reshape(*columns.shape[:2], _MATRIX_DEPTH, -1)
    tables = [torch.from_numpy(np.ascontiguousarray(table)).to(device, dtype) for table in (down, across)]
    return tables[0], tables[1]


def _axis_matrices(size: int, geometry: Geometry, tile: int, window: int) -> npt.NDArray[np.float64]:
    """[kinds, tile, axis, window]: the weight of each low-res pixel of a tile's window in each tap of each pixel.

    Low-res pixels beyond the edge have weights too: whoever loads the window repeats the edge.
    """
    radius, high = geometry.radius, 2 * size
    tiles = -(-high // tile)
    special = -(-radius // tile) + 1  # tiles at an end that reflect; the last may be cut short
    kinds = min(tiles, 2 * special + 1)
    number = np.arange(kinds)
    number[special + 1 :] += tiles - kinds
    pixel = number[:, None] * tile + np.arange(tile)  # [kinds, tile]
    tap = np.abs(pixel[..., None] + np.arange(-radius, radius + 1))
    tap = high - 1 - np.abs(high - 1 - tap)  # reflected at both ends
    first = first_source_pixel(tap) - (number * tile // 2 - geometry.margin)[:, None, None]
    inside = np.broadcast_to((pixel < high)[..., None], tap.shape)
    matrices = np.zeros((kinds, tile, geometry.axis, window))
    for k, weight in enumerate(WEIGHTS.T):
        matrices[(*np.nonzero(inside), first[inside] + k)] = weight[tap[inside] % 2]
    return matrices


@functools.lru_cache(maxsize=64)
def slide_tables(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices of zeros and ones that pick each pixel's taps from the window of its patch, along an axis.

    A pixel in row y of its patch finds tap a in row y + a of the window, and likewise in columns. As in `axis_tables`
    each is repeated along a diagonal, here to 16 taps and parts of the other axis.

    Args:
        geometry: of the kernels.
        dtype: of the weights in the window.
        device: theirs.

    Returns:
        rows [2, (window row, part), (tap, part)] and columns [8, (part, window column), (part, tap)].
    """
    repeat = np.eye(_MATRIX_DEPTH // geometry.axis)
    rows = _slides(_PATCH_ROWS, geometry.axis, geometry)
    columns = _slides(_PATCH_COLUMNS, geometry.key_columns, geometry)
    down = np.einsum("yka,pq->ykpaq", rows, repeat).reshape(_PATCH_ROWS, -1, _MATRIX_DEPTH)
    across = np.einsum("xkb,pq->xpkqb", columns, repeat).reshape(_PATCH_COLUMNS, -1, _MATRIX_DEPTH)
    tables = [torch.from_numpy(np.ascontiguousarray(table)).to(device, dtype) for table in (down, across)]
    return tables[0], tables[1]


def _slides(pixels: int, window: int, geometry: Geometry) -> npt.NDArray[np.bool_]:
    """[pixels, window, axis]: whether a place in the window is a tap of a pixel."""
    pixel, place, tap = np.ogrid[:pixels, :window, : geometry.axis]
    return np.asarray((place == pixel + tap) & (tap < geometry.width))


@functools.lru_cache(maxsize=64)
def squared_distances(geometry: Geometry, device: torch.device) -> Tensor:
    """From each of a patch's 16 pixels to its window's, in output pixels; −1 beyond the radius. [16, neighbours]."""
    pixel, place = np.arange(_PATCH_ROWS * _PATCH_COLUMNS)[:, None], np.arange(geometry.neighbours)
    down = place // geometry.key_columns - pixel // _PATCH_COLUMNS - geometry.radius
    across = place % geometry.key_columns - pixel % _PATCH_COLUMNS - geometry.radius
    inside = np.maximum(np.abs(down), np.abs(across)) <= geometry.radius
    distances = np.where(inside, down**2 + across**2, -1).astype(np.float32)
    return torch.from_numpy(distances).to(device)
