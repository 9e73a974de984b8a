"""Benchmarks of kernels."""
