"""Bilinear interpolation of whole maps with NumPy, for readers without torch."""

import numpy as np
import numpy.typing as npt

__all__ = ["interpolated"]

Floats = npt.NDArray[np.float32]


def interpolated(values: Floats, size: tuple[int, int]) -> Floats:
    """Interpolate [k, h, w] to [k, *size], half-pixel centres, borders repeated, as torch without ``align_corners``.

    There is no antialiasing: meant for axes that grow, or shrink to no less than half.
    """
    rows, columns = (_neighbours(old, new) for old, new in zip(values.shape[1:], size, strict=True))
    # Across rows first: contiguous lines.
    first, second, weight = rows
    high = values[:, first] * (1 - weight)[:, None] + values[:, second] * weight[:, None]
    first, second, weight = columns
    return np.asarray(high[:, :, first] * (1 - weight) + high[:, :, second] * weight, dtype=np.float32)


def _neighbours(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """The two source pixels of each target pixel, and the weight of the second."""
    centres = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, None)
    first = np.minimum(centres.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (centres - first).astype(np.float32)
