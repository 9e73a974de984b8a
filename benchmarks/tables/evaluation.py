"""Table of the tasks of jobs/evaluate.py."""

from typing import Any

from benchmarks import rows
from benchmarks.tables import formats
from pipeline.evaluate.bootstrap import Estimate

# Task -> its figure in the table, and the heading.
_FIGURES = {
    "segmentation": ("mean IoU", "segmentation, mean IoU"),
    "depth": ("RMSE", "depth, RMSE in m ↓"),
    "keypoints": ("PCK@0.1 of the box", "keypoints, PCK@0.1"),
    "video": ("J&F", "video, J&F"),
    "discovery": ("CorLoc", "discovery, CorLoc"),
    "held_out_views": ("error on held-out views", "held-out views, error ↓"),
}
_ORDER = ("bilinear", "jbu", "anyup", "multiview, 5 views", "multiview", "bilinear, image at 2×")


def evaluation() -> str:
    """The main figure of each task: bilinear's value, and differences to it."""
    latest = {(row["backbone"], row["method"], row["task"]): row for row in rows.read("evaluation")}
    measured = {task for _, _, task in latest}
    tasks = [task for task in _FIGURES if task in measured]
    table = [
        f"| backbone | features | {' | '.join(_FIGURES[task][1] for task in tasks)} |",
        f"|---|---|{'---|' * len(tasks)}",
    ]
    sides = dict.fromkeys((backbone, method) for backbone, method, _ in latest)
    for backbone, method in sorted(sides, key=lambda side: (side[0], _ORDER.index(side[1]))):
        cells = [_cell(latest.get((backbone, method, task)), task) for task in tasks]
        table.append(f"| {backbone} | {method} | {' | '.join(cells)} |")
    units = {task: row for (_, _, task), row in latest.items()}
    counted = ", ".join(f"{row['units']} {row['unit']}s ({task})" for task, row in units.items())
    return (
        "`bilinear`: value ± half of its 95% interval. Others: paired difference to it with its 95% interval, bold "
        f"where that excludes zero; ↓: less is better. k = 64, 224 px, over {counted} "
        "(`python -m benchmarks.evaluate.tasks --stores FOLDER`).\n\n"
    ) + "\n".join(table)


def _cell(row: dict[str, Any] | None, task: str) -> str:
    if row is None:
        return ""
    figure = row["figures"][_FIGURES[task][0]]
    if row["method"] == "bilinear":
        value = Estimate.of(figure["value"])
        return f"{value.mean:.3f} ± {value.half_width:.3f}"
    return formats.gain(Estimate.of(figure["difference"]))
