"""Operations of upsamplers: each has a public function that checks arguments, a plain-torch reference, and kernels.

`kernels.dispatch` chooses the implementation. Shared modules: `dtypes`; `compilation` and `simd` for CPU kernels;
`internals`, the private parts of numba and torch that are used. Imports nothing from the pipeline.
"""
