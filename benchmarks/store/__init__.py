"""Claims about stores: bytes, error, and rates of reading."""
