"""Bicubic ×2 along one axis, as `torch.nn.functional.interpolate` with ``align_corners=False``, on the host.

A high-res pixel is a weighted sum of four consecutive low-res pixels; pixels beyond the edge repeat the edge.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["WEIGHTS", "first_source_pixel", "margin"]

_A = -0.75  # Keys 1981, equation 4, with PyTorch's constant


def _near(x: float) -> float:
    """The cubic at a distance of 0 to 1."""
    return (_A + 2) * x**3 - (_A + 3) * x**2 + 1


def _far(x: float) -> float:
    """The cubic at a distance of 1 to 2."""
    return _A * (x**3 - 5 * x**2 + 8 * x - 4)


_ODD = [_far(1.25), _near(0.25), _near(0.75), _far(1.75)]  # high-res pixel 2i + 1 lies at i + 1/4
# [2, 4] float64: weights of the four low-res pixels around an even and around an odd high-res pixel.
WEIGHTS: npt.NDArray[np.float64] = np.array([_ODD[::-1], _ODD])


def first_source_pixel(high: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First of the four low-res pixels around a high-res pixel; it may lie beyond the edge."""
    first: npt.NDArray[np.int64] = high // 2 - 2 + high % 2
    return first


def margin(radius: int) -> int:
    """Reach of an output pixel's n × n high-res window in low-res pixels, bicubic taps included."""
    return radius // 2 + 2
