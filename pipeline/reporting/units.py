"""Quantities as text."""

__all__ = ["readable_size"]


def readable_size(nbytes: float) -> str:
    """Format a number of bytes: ``"1.23 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
