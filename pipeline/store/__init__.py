"""Encode features, write and commit shards, and verify and repair stores.

May import ``pipeline.features`` (the basis), ``pipeline.io``, and the kernels.
"""
