"""The result of an evaluation: each figure of each side with its interval, as values, as a table, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluate.bootstrap import Estimate, paired
from pipeline.evaluate.data.comparison import Comparison, counted
from pipeline.evaluate.task import Figure, Outcome
from pipeline.reporting.software import software_versions

__all__ = ["Result"]

FEW_UNITS = 20  # below, a bootstrap interval is too narrow


@dataclass(frozen=True, eq=False)
class Result:
    """The figures of a task.

    Attributes:
        task: its name.
        outcome: of the task.
        comparison: the sides, and notes on what was left out.
        estimates: figure -> side -> the figure, and its difference to the first side's.
    """

    task: str
    outcome: Outcome
    comparison: Comparison
    estimates: dict[str, dict[str, tuple[Estimate, Estimate]]]

    @classmethod
    def of(cls, task: str, outcome: Outcome, comparison: Comparison) -> "Result":
        """Estimate all figures; note which units lack one, and if the intervals are of few units."""
        units = len(outcome.units)
        if units == 1:
            comparison.notes.append(f"there is one {outcome.unit}: no intervals")
        elif units < FEW_UNITS:
            comparison.notes.append(f"the intervals resample {units} {outcome.unit}s: with so few they are too narrow")
        for side in comparison.sides:
            if side.store.attributes["configuration"]["storage"].get("represent") == "compact":
                comparison.notes.append(
                    f"{side.name}: s per image are without the last step of upsampling, which readers of a compact "
                    "store take"
                )
        baseline = comparison.sides[0].name
        for figure in outcome.figures:
            if without := int(figure.of_units(baseline).isnan().sum()):
                comparison.notes.append(f"{figure.name}: {without} of {units} {outcome.unit}s have nothing to count")
        estimates = {figure.name: paired(figure.counts, figure.metric, baseline) for figure in outcome.figures}
        return cls(task, outcome, comparison, estimates)

    @property
    def sides(self) -> Sequence[str]:
        """Names of the sides; the first is the baseline."""
        return [side.name for side in self.comparison.sides]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells: a row for each side; for each figure its value, and its difference to the baseline's."""
        several = len(self.sides) > 1
        headings = ["features"]
        for figure in self.outcome.figures:
            headings += [figure.name + ("" if figure.higher_is_better else " ↓"), *[f"− {self.sides[0]}"] * several]
        headings.append("s per image")
        cells = []
        for number, side in enumerate(self.comparison.sides):
            line = [side.name]
            for figure in self.outcome.figures:
                value, difference = self.estimates[figure.name][side.name]
                line.append(self._value(value, figure))
                if several:
                    line.append(self._difference(difference, figure) if number else "")
            line.append("" if side.seconds_per_image is None else f"{side.seconds_per_image:.3g}")
            cells.append(line)
        return headings, cells

    def describe(self) -> str:
        """The table and all that belongs to it, as text."""
        headings, cells = self.table()
        columns = list(zip(headings, *cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [headings, ["-" * width for width in widths], *cells]
        ]
        notes = [f"note: {note}" for note in self.comparison.notes]
        return "\n".join([f"{self.task}: {self.outcome.protocol}", *notes, "", *lines, "", self.explained()])

    def explained(self) -> str:
        """How to read the table."""
        seconds = "s per image: busy seconds of backbone and upsampler, from the ledger."
        if not self._resampled:
            return seconds
        runs = " and the runs" if any(len(one) > 1 for one in self.outcome.figures[0].counts.values()) else ""
        differences = (
            f"; differences to {self.sides[0]} with their 95% interval, * where that excludes zero"
            if len(self.sides) > 1
            else ""
        )
        units = counted(len(self.outcome.units), self.outcome.unit)
        return f"± half of the 95% interval over {units}{runs}{differences}. {seconds}"

    def to_dict(self, options: dict[str, Any]) -> dict[str, Any]:
        """For report.json."""
        return {
            "task": self.task,
            "protocol": self.outcome.protocol,
            "options": options,
            "notes": list(self.comparison.notes),
            "software": dict(software_versions()),
            "sides": [side.description() for side in self.comparison.sides],
            "baseline": self.sides[0],
            "unit": self.outcome.unit,
            "figures": {figure.name: self._figure(figure) for figure in self.outcome.figures},
            "units": self._units(),
            "details": dict(self.outcome.details),
        }

    @property
    def _resampled(self) -> bool:
        """Whether there are intervals: of one unit there are none."""
        return len(self.outcome.units) > 1

    def _value(self, value: Estimate, figure: Figure) -> str:
        if math.isnan(value.mean):
            return "none"
        interval = f" ± {value.half_width:.{figure.digits}f}" if self._resampled else ""
        return f"{value.mean:.{figure.digits}f}{interval}"

    def _difference(self, difference: Estimate, figure: Figure) -> str:
        if math.isnan(difference.mean):
            return ""
        mean, low, high = (
            _signed(value, figure.digits) for value in (difference.mean, difference.low, difference.high)
        )
        if not self._resampled:
            return mean
        return f"{mean} ({low} to {high})" + ("*" if difference.low > 0 or difference.high < 0 else "")

    def _figure(self, figure: Figure) -> dict[str, Any]:
        of_sides = {
            side: {"value": value.row(), "difference": difference.row()}
            for side, (value, difference) in self.estimates[figure.name].items()
        }
        return {"higher_is_better": figure.higher_is_better, "sides": of_sides}

    def _units(self) -> list[dict[str, Any]]:
        main = self.outcome.figures[0]
        values = {side: main.of_units(side).tolist() for side in self.sides}
        return [
            {"name": unit, main.name: {side: _rounded(values[side][number]) for side in self.sides}}
            for number, unit in enumerate(self.outcome.units)
        ]


def _rounded(value: float) -> float | None:
    """A value for JSON, which has no NaN."""
    return None if math.isnan(value) else round(value, 5)


def _signed(value: float, digits: int) -> str:
    """A difference with its sign, which zero does not have."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")
