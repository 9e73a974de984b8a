"""Tables of the tasks of jobs/evaluate.py: every upsampler on every task, and which upsampler to use."""

from typing import Any

from benchmarks import rows
from benchmarks.evaluate.tasks import METHODS
from benchmarks.tables import formats
from pipeline.evaluate.bootstrap import Estimate

# Task, its figure, and the heading of the column.
_COLUMNS = (
    ("segmentation", "mean IoU", "segmentation, mean IoU"),
    ("depth", "RMSE", "depth, RMSE in m ↓"),
    ("keypoints", "PCK@0.1 of the box", "keypoints, PCK@0.1"),
    ("keypoints", "PCK@0.05 of the box", "PCK@0.05"),
    ("video", "J&F", "video, J&F"),
    ("discovery", "CorLoc", "discovery, CorLoc"),
    ("held_out_views", "error on held-out views", "held-out views, error ↓"),
)
HEADINGS = {(task, figure): heading for task, figure, heading in _COLUMNS}
_ORDER = tuple(METHODS)
_BACKBONES = {"lite0": "EfficientNet-Lite0", "vit-ti": "ViT-Ti/16", "vit": "a ViT-S/14 of DINOv2's family"}
# Of the table in short. Method -> how the command line names it, and its weights; figures.
_OPTIONS = {
    "bilinear": ("`bilinear`", "none"),
    "jbu": ("`jbu`, the default", "none"),
    "jbu, wide kernels": ("`jbu --jbu-kernels wide`", "none"),
    "anyup": ("`anyup`", "published"),
    "bilinear, image at 2×": ("`bilinear --size 448 --output-size 224`", "none"),
    "multiview, 5 views": ("`multiview --views 5`", "fitted by the job"),
    "multiview": ("`multiview`", "fitted by the job"),
}
_IN_SHORT = ("mean IoU", "RMSE", "PCK@0.1 of the box", "J&F", "error on held-out views")

_Latest = dict[tuple[str, str, str], dict[str, Any]]  # (backbone, method, task) -> row


def _latest() -> _Latest:
    """The latest rows, each with ``cost``: its seconds over those of ``bilinear`` in the same run."""
    latest: _Latest = {}
    baseline: dict[tuple[str, str], float | None] = {}  # every run begins with it
    for row in rows.read("evaluation"):
        seconds, run = row.get("seconds_per_image"), (row["backbone"], row["task"])
        if row["method"] == "bilinear":
            baseline[run] = seconds
        base = baseline.get(run)
        latest[row["backbone"], row["method"], row["task"]] = {
            **row,
            "cost": seconds / base if seconds and base else None,
        }
    return latest


def choice() -> str:
    """Weights, cost and main figures of each upsampler, in short."""
    latest = _latest()
    columns = [column for column in _COLUMNS if column[1] in _IN_SHORT]
    headings = [heading.removesuffix(" ↓") for _, _, heading in columns]
    table = [f"| `--upsampler` | weights | cost | {' | '.join(headings)} |", f"|---|---|---|{'---|' * len(headings)}"]
    for method, (option, weights) in _OPTIONS.items():
        costs = [_cost(latest, backbone, method) or "–" for backbone in _BACKBONES]
        cells = [
            " / ".join(_cell(latest.get((backbone, method, task)), figure, False) or "–" for backbone in _BACKBONES)
            for task, figure, _ in columns
        ]
        table.append(f"| {option} | {weights} | {' / '.join(costs)} | {' | '.join(cells)} |")
    return (
        f"{' / '.join(_BACKBONES.values())}, 224 px, k = 64. Cost: time of backbone and upsampler over that of "
        "`bilinear`, on a CPU, within about a tenth. `bilinear`: the figure; others: the difference to it, bold where "
        "its 95% interval excludes zero; –: not measured. Of RMSE and error, less is better.\n\n"
    ) + "\n".join(table)


def evaluation() -> str:
    """The main figure of each task: bilinear's value, and differences to it."""
    latest = _latest()
    headings = [heading for _, _, heading in _COLUMNS]
    table = [f"| backbone | features | cost | {' | '.join(headings)} |", f"|---|---|---|{'---|' * len(headings)}"]
    sides = dict.fromkeys((backbone, method) for backbone, method, _ in latest)
    for backbone, method in sorted(sides, key=lambda side: ([*_BACKBONES].index(side[0]), _ORDER.index(side[1]))):
        cells = [_cell(latest.get((backbone, method, task)), figure) for task, figure, _ in _COLUMNS]
        cost = _cost(latest, backbone, method)
        table.append(f"| {backbone} | {method} | {cost} | {' | '.join(cells)} |")
    units = {task: row for (_, _, task), row in latest.items()}
    counted = ", ".join(f"{row['units']} {row['unit']}s ({task})" for task, row in units.items())
    return (
        "`bilinear`: value ± half of its 95% interval. Others: paired difference to it with its 95% interval, bold "
        "where that excludes zero; ↓: less is better. Cost: seconds of backbone and upsampler per image, over those of "
        f"`bilinear`, on one core, within about a tenth. k = 64, 224 px, over {counted} "
        "(`python -m benchmarks.evaluate.tasks --stores FOLDER`).\n\n"
    ) + "\n".join(table)


def _cost(latest: _Latest, backbone: str, method: str) -> str:
    """Seconds per image over those of bilinear, of the images for segmentation."""
    cost = latest.get((backbone, method, "segmentation"), {}).get("cost")
    return "" if cost is None else f"{cost:.2g}"


def _cell(row: dict[str, Any] | None, figure: str, interval: bool = True) -> str:
    """A figure of bilinear, or another's difference to it; empty if it was not measured."""
    if row is None:
        return ""
    if row["method"] == "bilinear":
        value = Estimate.of(row["figures"][figure]["value"])
        return f"{value.mean:.3f}" + (f" ± {value.half_width:.3f}" if interval else "")
    return formats.gain(Estimate.of(row["figures"][figure]["difference"]), interval)
