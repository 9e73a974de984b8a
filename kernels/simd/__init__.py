"""Numba's vector language: vectors of the processor for functions that it compiles, of use to every kernel for CPUs.

* `tiles`: the type, rows × columns of vectors in registers, and its arithmetic
* `memory`: tiles from arrays and back
* `functions`: exp2, GELU and the like, element by element
* `threads`: work shared out over Python's threads

It knows nothing of any kernel.
"""
