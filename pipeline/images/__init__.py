"""Which images a dataset has, their bytes and their pixels.

Folders in the order of the data: ``listing`` (a dataset to a table of references), ``reading`` (a reference to bytes),
``decoding`` (bytes to pixels). May import ``pipeline.io``, ``pipeline.reporting``, schemas and the reader.
"""
