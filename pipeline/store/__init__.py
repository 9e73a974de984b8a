"""From features to codes, to bytes, to shards that are committed; and whether what lies there is sound.

May import ``pipeline.features`` (the basis), ``pipeline.io``, and the kernels.
"""
