"""Weighted sums over windows of feature maps: the public operation. It checks arguments and runs what fits."""

from kernels.window.sum.operations import window_sum

__all__ = ["window_sum"]
