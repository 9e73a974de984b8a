"""Quantities and lists as text."""

from collections.abc import Sequence

__all__ = ["listed", "readable_size"]


def readable_size(nbytes: float) -> str:
    """Format a number of bytes: ``"1.23 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Join the first ``limit`` names with commas; an ellipsis stands for the others."""
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")
