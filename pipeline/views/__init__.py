"""Random views of an image, and what undoes them: for multiview and implicit upsamplers, and for training.

May import ``pipeline.features``.
"""
