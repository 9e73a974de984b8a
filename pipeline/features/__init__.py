"""From pixels to C channels of a timm backbone, and to k principal components.

May import ``pipeline.io``.
"""
