"""High-res features from many views of an image: the public operation. It checks arguments and runs what fits."""

from kernels.multiview.operations import (
    Choice,
    Solution,
    ViewMatrices,
    explain,
    solve,
)

__all__ = [
    "Choice",
    "Solution",
    "ViewMatrices",
    "explain",
    "solve",
]
