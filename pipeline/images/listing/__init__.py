"""List a dataset (folder, tars, Parquet) as a table of references, ``schemas.index.REFERENCES``."""
