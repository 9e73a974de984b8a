"""Benchmarks of whole jobs."""
