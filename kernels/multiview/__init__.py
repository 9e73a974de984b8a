"""High-res features from many views of an image: the public operation. It checks arguments and runs what fits."""

from kernels.multiview.operations import (
    Solution,
    ViewMatrices,
    solve,
)

__all__ = [
    "Solution",
    "ViewMatrices",
    "solve",
]
