"""Numbers and machines as tables and captions show them."""

import re
from typing import Any

from pipeline.evaluate.bootstrap import Estimate


def machine(row: dict[str, Any]) -> str:
    return f"{row['cores']} cores ({row['device']})"


def elsewhere(row: dict[str, Any], sample: dict[str, Any]) -> str:
    """The machine of a row, if it is not that of the sample, to which a table's caption refers."""
    return "" if row["device"] == sample["device"] else f" (on {machine(row)})"


def ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s" if value else "none"


def time_and_memory(measured: dict[str, Any] | None, batch: int) -> str:
    if measured is None:
        return "out of memory"
    return f"{ms(measured['ms_per_image'])}, {measured['peak_bytes'] / batch / 1e6:,.0f} MB"


def gain(difference: Estimate, interval: bool = True) -> str:
    """A difference, with its interval if asked for, bold where that excludes zero."""
    text = f"{difference.mean:+.3f}" + (f" ({difference.low:+.3f} to {difference.high:+.3f})" if interval else "")
    text = re.sub(r"[+-]0\.000", "0.000", text).replace("-", "−")
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text
