"""High-res features from many views of an image: the public operation, which checks arguments and runs a solver."""

from kernels.dispatch import Choice
from kernels.multiview.operations import explain, smooth, solve
from kernels.multiview.views import Solution, ViewMatrices

__all__ = [
    "Choice",
    "Solution",
    "ViewMatrices",
    "explain",
    "smooth",
    "solve",
]
