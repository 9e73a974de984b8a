"""SIMD vectors for functions compiled by numba, shared by all CPU kernels.

* `tiles`: the type, rows × columns of vectors in registers, and its arithmetic
* `memory`: loads and stores of tiles
* `functions`: exp2, GELU and the like, elementwise
* `threads`: distributes work over Python threads

It does not depend on any kernel.
"""
