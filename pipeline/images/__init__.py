"""List a dataset's images, read their bytes and decode their pixels.

Subpackages in data-flow order: ``listing`` (dataset to a table of references), ``reading`` (reference to bytes),
``decoding`` (bytes to pixels).
"""
