"""The private parts of numba and torch that kernels use: `numba` and `torch`.

Each is wrapped in one function, whose docstring names the public behaviour that it replaces. No other module of
`kernels` uses private parts. If a new version breaks one, `tests/kernels/test_internals.py` shows which.
"""
