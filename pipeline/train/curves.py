"""Plot the curves of a training."""

import io
from dataclasses import dataclass

from pipeline.train.checkpoints import TrainState
from pipeline.train.objectives.base import LOSS

__all__ = ["curves"]

_WIDTH, _HEIGHT = 5.6, 3.6  # size of a panel in inches
_POINTS = 60  # approximate number of points per curve; losses are averaged over intervals


@dataclass(frozen=True)
class _Line:
    name: str
    points: list[tuple[float, float]]  # step, value


def curves(state: TrainState) -> bytes:
    """Plot losses by backbone, and for each measured backbone the errors on held-out views; return a PNG."""
    from matplotlib.figure import Figure  # takes a second to import; not pyplot, which keeps references to figures

    panels = _loss_panels(state) + _error_panels(state)
    columns = max(1, len(panels))  # at step 0 there are no measurements yet
    figure = Figure((_WIDTH * columns, _HEIGHT), dpi=100, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, columns, squeeze=False)[0], panels, strict=False):
        for line in lines:
            axes.plot(*zip(*line.points, strict=True), marker=".", label=line.name)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _loss_panels(state: TrainState) -> list[tuple[str, list[_Line]]]:
    names = dict.fromkeys(row.backbone for row in state.losses)
    lines = [
        _Line(name, _smoothed([(row.step, row.losses[LOSS]) for row in state.losses if row.backbone == name]))
        for name in names
    ]
    return [("loss", lines)] if lines else []


def _error_panels(state: TrainState) -> list[tuple[str, list[_Line]]]:
    panels = []
    for label in dict.fromkeys(row.backbone for row in state.held_out):
        rows = [row for row in state.held_out if row.backbone == label]
        lines = [
            _Line(upsampler, [(row.step, row.errors[upsampler].relative) for row in rows])
            for upsampler in rows[0].errors
        ]
        untrained = "" if rows[0].trained_on else ", not trained on"
        panels.append((f"held-out views: relative error, {label}{untrained}", lines))
    return panels


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average over intervals of equal length."""
    length = max(1, len(points) // _POINTS)
    intervals = [points[i : i + length] for i in range(0, len(points), length)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in intervals]
