"""Unsupervised object discovery.

TokenCut (Wang et al., CVPR 2022), without training: cells of an image are nodes of a graph, similar ones are connected,
and the second smallest eigenvector of its normalised Laplacian cuts it in two. The side with the most extreme cell is
the foreground, and the box around the part of it that is connected with this cell is the object found. CorLoc is the
share of the images where it overlaps a labelled box by more than half (intersection over union). Features are centred
on the mean of the dataset, unlike TokenCut's: cosines of features that share a mean are nearly all above its threshold.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from densefeat.align import MaskFolder
from pipeline.evaluate.data.comparison import Comparison, counted, spread
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.labels import first_labelled, labelled
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.probe import share
from pipeline.evaluate.report.pictures import photograph, with_boxes
from pipeline.evaluate.task import Figure, Outcome, Panel
from schemas.evaluate_options import EvaluateConfig

__all__ = ["box_iou", "check", "components", "evaluate", "foreground"]

_THRESHOLD, _UNCONNECTED = 0.2, 1e-5  # TokenCut's cosine of connected cells, and the weight between others
_CORRECT = 0.5
_LEAST_AREA = 0.01  # of the visible image: smaller parts of a mask are no objects

Box = tuple[float, float, float, float]  # y0, x0, y1, x1, in pixels of the grid
Mask = npt.NDArray[np.bool_]


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse masks that are not there.

    Raises:
        JobError: as described.
    """
    first_labelled(MaskFolder(str(config.labels)).files, spread(keys, config.limit))


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: no image has objects.
    """
    folder = MaskFolder(str(config.labels))

    def objects(mask: npt.NDArray[Any]) -> list[Box]:
        return _objects(mask, config.objects, {0, *config.ignore})

    def usable(_: str, mask: npt.NDArray[Any]) -> bool:
        return bool(objects(mask))

    values = " ".join(map(str, config.objects)) or f"any but 0 and --ignore {' '.join(map(str, config.ignore))}"
    expected = f"an object (value {values}) of {_LEAST_AREA:.0%} of the image or more"
    keys = labelled(comparison, spread(comparison.keys, config.limit), folder, usable, expected=expected)
    overlaps: dict[str, list[float]] = {side.name: [] for side in comparison.sides}
    for key in keys:
        grid = comparison.grid(key)
        truth = objects(grid.nearest(folder(key)))
        for side in comparison.sides:
            found = _found(comparison, side, key, grid, config.discovery_rows)
            overlaps[side.name].append(max(box_iou(found, box) for box in truth))

    def draw(unit: int) -> list[Panel]:
        key = keys[unit]
        grid = comparison.grid(key)
        photo = photograph(comparison, key, grid)
        panels = [photo, Panel("labels", with_boxes(photo, objects(grid.nearest(folder(key)))))]
        for side in comparison.sides:
            box = _found(comparison, side, key, grid, config.discovery_rows)
            panels.append(Panel(side.name, with_boxes(photo, [box])))
        return panels

    counts = {side: _counts(torch.tensor(own, dtype=torch.float64)) for side, own in overlaps.items()}
    return Outcome(
        protocol=(
            f"TokenCut (Wang et al., CVPR 2022) on a grid of {config.discovery_rows} rows, without training, on "
            f"{counted(len(keys), 'image')}. CorLoc: the box found overlaps that of an object by more "
            f"than half. Objects are connected parts of one value in a mask, of at least {_LEAST_AREA:.0%} of the "
            "image."
        ),
        unit="image",
        units=keys,
        figures=[
            Figure("CorLoc", {side: own[..., 1:] for side, own in counts.items()}, share),
            Figure("overlap", {side: own[..., ::2] for side, own in counts.items()}, share),
        ],
        draw=draw,
    )


def _counts(overlaps: Tensor) -> Tensor:
    """Overlap, whether it is enough, and 1, of each image: [1, P, 3]."""
    return torch.stack([overlaps, (overlaps > _CORRECT).double(), torch.ones_like(overlaps)], 1)[None]


def _objects(mask: npt.NDArray[Any], values: Sequence[int], none: set[int]) -> list[Box]:
    """Boxes of the connected parts of every value; ``values`` empty: all but ``none``."""
    boxes = []
    for value in values or sorted({*np.unique(mask).tolist()} - none):
        parts = components(mask == value)
        for part in np.unique(parts[parts >= 0]):
            here = parts == part
            if here.mean() >= _LEAST_AREA:
                boxes.append(_box(here))
    return boxes


def components(mask: Mask) -> npt.NDArray[np.int64]:
    """Connected parts of a mask (4 neighbours), as one number each, −1 outside: [m, n]."""
    numbers = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    while True:
        before = numbers.copy()
        for axis in range(2):
            for flip in (slice(None), slice(None, None, -1)):
                view = numbers[flip] if axis == 0 else numbers[:, flip]
                lines, inside = (view, mask[flip]) if axis == 0 else (view.T, mask[:, flip].T)
                for i in range(1, len(lines)):  # along the axis, so that a straight part needs one pass
                    lines[i] = np.where(inside[i] & inside[i - 1], np.maximum(lines[i], lines[i - 1]), lines[i])
        if np.array_equal(before, numbers):
            return numbers


def _box(mask: Mask) -> Box:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(rows[0]), float(columns[0]), float(rows[-1] + 1), float(columns[-1] + 1)


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    inside = [max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in range(2)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    common = inside[0] * inside[1]
    return common / (sum(areas) - common)


def _found(comparison: Comparison, side: Side, key: str, grid: Grid, rows: int) -> Box:
    """The box around the object of a side, in pixels of the grid."""
    height, width = grid.shape
    cells = min(rows, height), min(max(1, round(rows * width / height)), width)
    mask = foreground(F.adaptive_avg_pool2d(comparison.features(side, key, grid), cells))
    y0, x0, y1, x1 = _box(mask)
    scale = height / cells[0], width / cells[1]
    return y0 * scale[0], x0 * scale[1], y1 * scale[0], x1 * scale[1]


def foreground(features: Tensor) -> Mask:
    """The object of an image: the part of the foreground that is connected with its most extreme cell.

    Args:
        features: [k, r, c], centred on the mean of the dataset.

    Returns:
        [r, c] bool.
    """
    _, rows, columns = features.shape
    unit = F.normalize(features.flatten(1), dim=0)
    weights = torch.where(unit.T @ unit > _THRESHOLD, 1.0, _UNCONNECTED).double()
    degrees = weights.sum(1)
    scale = degrees.rsqrt()
    laplacian = torch.eye(len(weights), dtype=torch.float64) - scale[:, None] * weights * scale
    vector = scale * torch.linalg.eigh(laplacian).eigenvectors[:, 1]
    seed = int(vector.abs().argmax())
    above = vector > vector.mean()
    side = above if above[seed] else ~above
    parts = components(side.view(rows, columns).numpy())
    return np.asarray(parts == parts.reshape(-1)[seed])
