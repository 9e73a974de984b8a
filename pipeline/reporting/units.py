"""Quantities and lists as text."""

from collections.abc import Sequence

__all__ = ["listed", "readable_duration", "readable_size"]


def readable_size(nbytes: float) -> str:
    """Format a number of bytes: ``"1.23 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def readable_duration(seconds: float) -> str:
    """Format a duration: ``"12 s"``, ``"3.5 min"``, ``"2.1 h"``."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < most * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Join the first ``limit`` names with commas; an ellipsis stands for the others."""
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")
