"""Weighted sums over windows of feature maps: the public operation, which checks arguments and runs a kernel."""

from kernels.window.sum.operations import window_sum

__all__ = ["window_sum"]
