"""From the place of a dataset (folder, list, tars, Parquet) to a table of references, ``schemas.index.REFERENCES``."""
