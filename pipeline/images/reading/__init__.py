"""Read the bytes of referenced images, with retries. Imports names from ``listing``."""
