"""Benchmarks of upsamplers."""
