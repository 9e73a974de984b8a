"""Tables of the tasks of jobs/evaluate.py: every upsampler on every task, and which upsampler to use."""

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
_ORDER = (
    "bilinear", "jbu", "jbu, wide kernels", "jbu, trained", "lift", "anyup", "bilinear, image at 2×",
    "multiview, 5 views", "multiview", "multiview, not smoothed", "multiview, 21 views",
)  # fmt: skip


_BACKBONES = {"lite0": "EfficientNet-Lite0", "vit-ti": "ViT-Ti/16", "vit": "a ViT-S/14 of DINOv2's family"}
# Method -> how the command line names it; the tasks that tell which to use.
_OPTIONS = {
    "bilinear": "`bilinear`",
    "jbu": "`jbu`, the default",
    "jbu, wide kernels": "`jbu --jbu-kernels wide`",
    "anyup": "`anyup`",
    "multiview, 5 views": "`multiview --views 5`",
    "multiview": "`multiview`",
}
_WEIGHTS = {"anyup": "published", "multiview": "fitted by the job"}
_CHOICE = ("segmentation", "depth", "keypoints", "held_out_views")

_Latest = dict[tuple[str, str, str], dict[str, Any]]  # (backbone, method, task) -> row


def _latest() -> _Latest:
    return {(row["backbone"], row["method"], row["task"]): row for row in rows.read("evaluation")}


def choice() -> str:
    """Weights, cost and main figures of each upsampler, in short."""
    latest = _latest()
    headings = [_FIGURES[task][1].replace(" ↓", "") for task in _CHOICE]
    table = [f"| `--upsampler` | weights | cost | {' | '.join(headings)} |", f"|---|---|---|{'---|' * len(headings)}"]
    for method, option in _OPTIONS.items():
        weights = _WEIGHTS.get(method.partition(",")[0], "none")
        costs = [_cost(latest, backbone, method) or "–" for backbone in _BACKBONES]
        cells = [" / ".join(_short(latest, backbone, method, task) for backbone in _BACKBONES) for task in _CHOICE]
        table.append(f"| {option} | {weights} | {' / '.join(costs)} | {' | '.join(cells)} |")
    return (
        f"{' / '.join(_BACKBONES.values())}, 224 px, k = 64. Cost: time of backbone and upsampler over that of "
        "`bilinear`, on a CPU. `bilinear`: the figure; others: the difference to it, bold where its 95% interval "
        "excludes zero. Of RMSE and error, less is better.\n\n"
    ) + "\n".join(table)


def _short(latest: _Latest, backbone: str, method: str, task: str) -> str:
    """A figure of bilinear, or another's difference to it, without intervals."""
    row = latest.get((backbone, method, task))
    if row is None:
        return "–"
    figure = row["figures"][_FIGURES[task][0]]
    if method == "bilinear":
        return f"{Estimate.of(figure['value']).mean:.3f}"
    return formats.gain(Estimate.of(figure["difference"]), interval=False)


def evaluation() -> str:
    """The main figure of each task: bilinear's value, and differences to it."""
    latest = _latest()
    measured = {task for _, _, task in latest}
    tasks = [task for task in _FIGURES if task in measured]
    table = [
        f"| backbone | features | cost | {' | '.join(_FIGURES[task][1] for task in tasks)} |",
        f"|---|---|---|{'---|' * len(tasks)}",
    ]
    sides = dict.fromkeys((backbone, method) for backbone, method, _ in latest)
    for backbone, method in sorted(sides, key=lambda side: (side[0], _ORDER.index(side[1]))):
        cells = [_cell(latest.get((backbone, method, task)), task) for task in tasks]
        cost = _cost(latest, backbone, method)
        table.append(f"| {backbone} | {method} | {cost} | {' | '.join(cells)} |")
    units = {task: row for (_, _, task), row in latest.items()}
    counted = ", ".join(f"{row['units']} {row['unit']}s ({task})" for task, row in units.items())
    return (
        "`bilinear`: value ± half of its 95% interval. Others: paired difference to it with its 95% interval, bold "
        "where that excludes zero; ↓: less is better. Cost: seconds of backbone and upsampler per image, over those of "
        f"`bilinear`, on one core. k = 64, 224 px, over {counted} "
        "(`python -m benchmarks.evaluate.tasks --stores FOLDER`).\n\n"
    ) + "\n".join(table)


def _cost(latest: _Latest, backbone: str, method: str) -> str:
    """Seconds per image over those of bilinear, of the images for segmentation."""
    seconds = [
        latest.get((backbone, name, "segmentation"), {}).get("seconds_per_image") for name in (method, "bilinear")
    ]
    return f"{seconds[0] / seconds[1]:.2g}" if all(seconds) else ""


def _cell(row: dict[str, Any] | None, task: str) -> str:
    if row is None:
        return ""
    figure = row["figures"][_FIGURES[task][0]]
    if row["method"] == "bilinear":
        value = Estimate.of(figure["value"])
        return f"{value.mean:.3f} ± {value.half_width:.3f}"
    return formats.gain(Estimate.of(figure["difference"]))
