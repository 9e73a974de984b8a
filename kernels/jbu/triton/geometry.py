"""Shapes and tables of the Triton kernels of joint bilateral upsampling, computed on the host.

A program computes a tile of 4 × 16 output pixels (4 × 8 from radius 4 on) of one image. Within it, patches of 2 × 8
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

MAX_RADIUS = 7  # 15 × 15 taps are padded to 256 on the chip; radius 8 would need 1024, which do not fit in registers

_TILE_ROWS = 4
_PATCH_ROWS, _PATCH_COLUMNS = 2, 8
_MAX_GRID = 65535  # programs along the second and third axis of a launch
_MATRIX_DEPTH = 16  # smallest number of products that a matrix instruction sums, for half operands


@dataclass(frozen=True)
class Geometry:
    """All shapes that follow from the radius.

    Args:
        radius: radius of the kernel in output pixels.

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
        """Number of taps along an axis."""
        return 2 * self.radius + 1

    @property
    def axis(self) -> int:
        """Padded number of taps along an axis on the chip; also holds a patch's window, which has one row more."""
        return max(8, power_of_two(self.width))

    @property
    def patches_across(self) -> int:
        """Patches along a tile's row. For large radii it is 1: with 256 taps, two would not fit in registers."""
        return 2 if self.radius < 4 else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of output pixels per program."""
        return _TILE_ROWS, _PATCH_COLUMNS * self.patches_across

    @property
    def key_columns(self) -> int:
        """Columns of a patch's window of neighbours, padded."""
        return power_of_two(_PATCH_COLUMNS + 2 * self.radius)

    @property
    def neighbours(self) -> int:
        """Pixels of a patch's window, padded."""
        return self.axis * self.key_columns

    @property
    def margin(self) -> int:
        """As `kernels.jbu.bicubic.margin`."""
        return margin(self.radius)

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of low-res pixels in a tile's window."""
        rows, columns = (power_of_two(size // 2 + 2 * self.margin) for size in self.tile)
        return rows, columns

    @property
    def hidden(self) -> int:
        """Hidden channels of the learned correction, on the chip."""
        return max(_MATRIX_DEPTH, power_of_two(self.width**2))

    def constants(self) -> dict[str, int]:
        """Compile-time constants of every kernel."""
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
            ValueError: the grid exceeds CUDA's limits.
        """
        across, down = -(-W // self.tile[1]), -(-H // self.tile[0])
        if max(down, B) > _MAX_GRID:
            raise ValueError(
                f"output: got {B} images of {H} × {W}, need at most {_MAX_GRID} of at most "
                f"{_MAX_GRID * self.tile[0]} rows at once. Split the batch."
            )
        return across, down, B


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


@functools.lru_cache(maxsize=256)
def axis_tables(geometry: Geometry, h: int, w: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices from a tile's kernels to weights of its low-res window, per axis: bicubic ×2 and reflection.

    All tiles away from the border share one matrix. The depth of the matrices is 16, which is more than the taps of one
    axis. So each matrix is repeated along a diagonal, which passes parts of the other axis through unchanged.

    Args:
        geometry: geometry of the kernels.
        h: rows of the source.
        w: columns of the source.
        dtype: dtype of the source.
        device: device of the source.

    Returns:
        rows [kinds, tile rows, (tap, part), (window row, part)] and columns [kinds, tile columns, (part, tap),
        (part, window column)]. The kinds of the first half are those of the first tiles, the kinds after the middle are
        those of the last tiles, and the middle kind is that of all others.
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

    Low-res pixels beyond the edge have weights too: the edge is repeated when the window is loaded.
    """
    radius, high = geometry.radius, 2 * size
    tiles = -(-high // tile)
    special = -(-radius // tile) + 1  # tiles at an end that reflect; the last tile may be incomplete
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
    """Matrices of zeros and ones that select each pixel's taps from the window of its patch, per axis.

    For a pixel in row y of its patch, tap a is in row y + a of the window, and likewise in columns. As in
    `axis_tables`, each matrix is repeated along a diagonal, here to 16 taps and parts of the other axis.

    Args:
        geometry: geometry of the kernels.
        dtype: dtype of the weights in the window.
        device: device of the weights.

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
    """[pixels, window, axis] bool: whether a position in the window is this tap of the pixel."""
    pixel, place, tap = np.ogrid[:pixels, :window, : geometry.axis]
    return np.asarray((place == pixel + tap) & (tap < geometry.width))


@functools.lru_cache(maxsize=64)
def squared_distances(geometry: Geometry, device: torch.device) -> Tensor:
    """Squared distances in output pixels from a patch's 16 pixels to its window's, −1 beyond the radius.

    Returns:
        [16, neighbours] float32.
    """
    pixel, place = np.arange(_PATCH_ROWS * _PATCH_COLUMNS)[:, None], np.arange(geometry.neighbours)
    down = place // geometry.key_columns - pixel // _PATCH_COLUMNS - geometry.radius
    across = place % geometry.key_columns - pixel % _PATCH_COLUMNS - geometry.radius
    inside = np.maximum(np.abs(down), np.abs(across)) <= geometry.radius
    distances = np.where(inside, down**2 + across**2, -1).astype(np.float32)
    return torch.from_numpy(distances).to(device)
