"""Vectors of the processor for functions that numba compiles: of use to every kernel for CPUs."""
