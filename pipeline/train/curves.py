"""The curves of a training as a picture, drawn with Pillow, which is here anyway: a plotting library is not."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from pipeline.train.checkpoints import TrainState
from pipeline.train.objectives.base import LOSS

__all__ = ["curves"]

_WIDTH, _HEIGHT = 560, 360  # of a panel, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 40  # margins of a panel
_NAME = 14  # height of a line's name, in pixels
_INK, _GRID, _PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))
_POINTS = 60  # a loss is averaged over stretches, so that a curve has about so many
_TICKS = 5  # at most about so many an axis


@dataclass(frozen=True)
class _Line:
    name: str
    points: list[tuple[float, float]]  # step, value


def curves(state: TrainState) -> bytes:
    """Losses by backbone, and for each backbone measured on the errors on held-out views: a PNG."""
    panels = _loss_panels(state) + _error_panels(state)
    image = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), _PAPER)
    for number, (title, lines) in enumerate(panels):
        image.paste(_panel(title, lines), (number * _WIDTH, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
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
    """Means over stretches of equal length."""
    length = max(1, len(points) // _POINTS)
    stretches = [points[i : i + length] for i in range(0, len(points), length)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _panel(title: str, lines: Sequence[_Line]) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    (x_low, x_high), (y_low, y_high) = (_range([point[axis] for point in points]) for axis in (0, 1))
    y_high += (y_high - y_low) * _NAME * len(lines) / (_HEIGHT - _TOP - _BOTTOM)  # room for the names of the lines

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return right, down

    for y in _ticks(y_low, y_high):
        draw.line([place(x_low, y), place(x_high, y)], _GRID)
        draw.text((_LEFT - 8, place(x_low, y)[1]), f"{y:.4g}", _INK, font, anchor="rm")
    for x in _ticks(x_low, x_high):
        draw.text((place(x, y_low)[0], _HEIGHT - _BOTTOM + 8), f"{x:.4g}", _INK, font, anchor="mt")
    draw.text((_LEFT, 8), title, _INK, font)
    draw.text((_WIDTH - _RIGHT, _HEIGHT - 4), "step", _INK, font, anchor="rb")
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn = [place(*point) for point in line.points if math.isfinite(point[1])]
        draw.line(drawn, colour, 2)
        for right, down in drawn:
            draw.ellipse([right - 2, down - 2, right + 2, down + 2], colour)
        draw.text((_WIDTH - _RIGHT - 4, _TOP + 4 + _NAME * number), line.name, colour, font, anchor="rt")
    return image


def _range(values: list[float]) -> tuple[float, float]:
    """From the least to the greatest value, with a little room."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.05 * (high - low) or max(0.5, 0.05 * abs(high))
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two: multiples of 1, 2 or 5 times a power of ten."""
    least = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
