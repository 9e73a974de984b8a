"""Benchmarks of the reader."""
