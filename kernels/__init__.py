"""Operations of upsamplers: each a public face that checks arguments, a plain-torch reference, and implementations.

`kernels.dispatch` chooses among these. What all share: `dtypes`; `compilation` and `simd` of those for CPUs;
`internals`, private parts of numba and torch. Imports nothing of the pipeline.
"""
