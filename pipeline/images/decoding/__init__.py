"""Decode image bytes to pixels on the target geometry. Imports no other subpackage of ``pipeline.images``."""
