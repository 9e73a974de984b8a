"""Make the README's figures from the rows in ``results/``: python -m benchmarks.figures."""

import statistics
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import rows

_COLOURS = {
    "multiview": "C0",
    "bilinear": "C7",
    "bilinear, less the bias": "C8",
    "jbu": "C3",
    "jbu, less the bias": "C1",
    "implicit, default schedule": "C2",
    "implicit, FeatUp's schedule": "C4",
}
_TITLES = {"vit": "ViT-S/14 (DINOv2), block 10", "lite0": "EfficientNet-Lite0, stride 16"}


def fits() -> None:
    """Plot the error on held-out views over seconds, including backbone passes; as a curve for implicit's schedules."""
    latest = {(row["backbone"], row["method"]): row for row in rows.read("implicit") if not rows.on_gpu(row)}
    few = min(row["photos"] for row in latest.values())
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, (backbone, title) in zip(panels, _TITLES.items(), strict=True):
        methods = {method: row for (name, method), row in latest.items() if name == backbone}
        _panel(panel, methods, few)
        panel.set(title=title, xscale="log", xlim=(3e-3, 3e3), xlabel="seconds per image, one core")
    panels[0].set_ylabel(f"error on held-out views, {few} photographs")
    panels[0].set_ylim(0, 0.85)
    figure.savefig(rows.RESULTS / "fits.svg", metadata={"Date": None})


def _panel(panel: Axes, methods: dict[str, dict[str, Any]], few: int) -> None:
    views = sorted((row for name, row in methods.items() if name.startswith("multiview")), key=_seconds)
    line = [_seconds(row) for row in views], [_error(row, few) for row in views]
    panel.plot(*line, "o-", c=_COLOURS["multiview"], label="multiview, by views")
    for row in views:
        at = (_seconds(row), _error(row, few))
        panel.annotate(str(row["settings"]["views"]), at, (0, -12), textcoords="offset points", ha="center")
    for name, row in methods.items():
        if "curve" in row:
            seconds = [row["extraction_s"] + look["s"] for look in row["curve"]]
            panel.plot(seconds, [look["own_error"] for look in row["curve"]], ".-", c=_COLOURS[name], label=name)
        elif row not in views:
            panel.plot(_seconds(row), _error(row, few), "s", c=_COLOURS[name], label=name)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small")


def _seconds(row: dict[str, Any]) -> float:
    return float(row["fit_s"] + row["extraction_s"])


def _error(row: dict[str, Any], few: int) -> float:
    """Mean error on the photographs that all methods were measured on."""
    errors = row["errors"]
    return statistics.mean(errors[:: len(errors) // few])


def training() -> None:
    """Plot, for each recipe, the loss over steps and the error on held-out views relative to bilinear interpolation."""
    latest = {row["recipe"]: row for row in rows.read("training")}
    columns = len(latest)
    figure, panels = plt.subplots(
        2, columns, figsize=(3 * columns, 5), sharex="col", layout="constrained", squeeze=False
    )
    for (above, below), (recipe, row) in zip(panels.T, latest.items(), strict=True):
        above.plot(*zip(*row["losses"], strict=True), c="C7")
        above.set_title(recipe)
        _held_out(below, row, recipe.split()[0])
        below.axhline(1, c="0.6", lw=1)
        below.set_xlabel("step")
        for panel in (above, below):
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss")
    panels[1][0].set_ylabel("held-out error / bilinear's")
    figure.savefig(rows.RESULTS / "training.svg", metadata={"Date": None})


def _held_out(panel: Axes, row: dict[str, Any], trained: str) -> None:
    for backbone, own in rows.by_backbone(row["held_out"]).items():
        shares = [
            float(measured[f"{trained}_relative_error"]) / float(measured["bilinear_relative_error"])
            for measured in own
        ]
        label = backbone + ("" if own[0]["trained_on"] == "1" else ", not trained on")
        panel.plot([int(measured["step"]) for measured in own], shares, "o-", ms=3, label=label)
    panel.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "densefeat", "svg.fonttype": "none", "axes.spines.top": False})
    fits()
    training()
