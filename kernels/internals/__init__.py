"""Numba's and torch's own parts that kernels use beside their public interface: `numba`, and `torch`.

One function each, which says the public behaviour that it stands in for. No other module of kernels uses such parts.
Where a new version breaks one, `tests/kernels/test_internals.py` says which.
"""
