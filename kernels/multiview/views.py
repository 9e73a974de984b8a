"""Input and output of the multiview solver: the views as matrices, and the solution with its statistics."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Band", "Bands", "Solution", "ViewMatrices"]

_ROWS_IN_BAND = 32  # enough to make a matrix product worth its call, few enough that their supports overlap


class Band(NamedTuple):
    """Some rows of a matrix, and the columns in which they are not zero.

    Attributes:
        rows: first row and the row after the last, in sorted order.
        support: first column and the column after the last.
        matrix: [rows, support], dense.
    """

    rows: tuple[int, int]
    support: tuple[int, int]
    matrix: Tensor


@dataclass(frozen=True, eq=False)
class Bands:
    """A tall sparse matrix [n, length] as dense bands, its rows sorted by the centre of their weights on the axis.

    Attributes:
        bands: bands of the sorted rows.
        place: [n] int64, sorted position of each row.
        order: [n] int64, row at each sorted position.
    """

    bands: tuple[Band, ...]
    place: Tensor
    order: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Bands":
        """Sort and split a matrix [n, length]. Exact: only zeros are omitted."""
        positions = torch.arange(matrix.shape[1], dtype=torch.float64, device=matrix.device)
        weights = matrix.double().abs()
        order = torch.argsort((weights @ positions) / weights.sum(1).clamp(min=1e-30), stable=True)
        bands = []
        for first in range(0, len(matrix), _ROWS_IN_BAND):
            rows = matrix[order[first : first + _ROWS_IN_BAND]]
            used = rows.ne(0).any(0).nonzero().flatten()
            support = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            bands.append(Band((first, first + len(rows)), support, rows[:, slice(*support)].contiguous()))
        return cls(tuple(bands), torch.argsort(order), order)


@dataclass(frozen=True, eq=False)
class ViewMatrices:
    """V separable linear maps from the solution to the backbone's features of a view: ``rows[t] @ map @ columns[t].T``.

    Attributes:
        rows: [V, h, H] floating: view, then pooling, then interpolation from the solver's grid, along the rows.
        columns: [V, w, W], likewise, of the same dtype and on the same device.

    Raises:
        ValueError: the shapes, dtypes or devices do not agree.
    """

    rows: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.rows, self.columns
        for name, matrices in (("rows", rows), ("columns", columns)):
            if matrices.ndim != 3 or not matrices.is_floating_point() or matrices.numel() == 0:
                raise ValueError(
                    f"{name}: got {tuple(matrices.shape)} {matrices.dtype}, need [V, low, high] of a floating dtype, "
                    "not empty"
                )
        if len(rows) != len(columns) or rows.dtype != columns.dtype or rows.device != columns.device:
            raise ValueError(
                f"columns: got {len(columns)} of {columns.dtype} on {columns.device}, need as the rows: {len(rows)} of "
                f"{rows.dtype} on {rows.device}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def low(self) -> tuple[int, int]:
        """Size of the features of a view, (h, w)."""
        return self.rows.shape[1], self.columns.shape[1]

    @property
    def high(self) -> tuple[int, int]:
        """Size of the solution, (H, W)."""
        return self.rows.shape[2], self.columns.shape[2]

    @functools.cached_property
    def row_bands(self) -> Bands:
        """All rows of all views, [V*h, H], as bands."""
        return Bands.of(self.rows.flatten(0, 1))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ViewMatrices":
        """The same maps on another device or in another dtype."""
        return ViewMatrices(self.rows.to(device, dtype), self.columns.to(device, dtype))

    def project(self, maps: Tensor) -> Tensor:
        """Apply the views to maps [B, k, H, W]: the features [B, V, k, h, w] that the backbone would give of them."""
        seen = torch.einsum("vip,bkpq->bvkiq", self.rows, maps)
        return seen @ self.columns.mT[None, :, None]


class Solution(NamedTuple):
    """Result of the solver.

    Attributes:
        features: [B, k, H, W], dtype of the targets.
        initial: [B] float64, the objective at the start.
        final: [B] float64, the objective at the end: not above the initial one, unless arithmetic broke down. NaN
            if a target, the guidance or the start was not finite.
        iterations: [B, k] int64, number of steps of each channel.
    """

    features: Tensor
    initial: Tensor
    final: Tensor
    iterations: Tensor
