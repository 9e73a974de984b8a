"""Semantic segmentation with a linear probe.

The protocol is the linear probe of DINOv2 (Oquab et al., TMLR 2024, section 7.4), with a classifier that is fitted to
convergence instead of by SGD, on a sample of pixels: frozen features, one linear layer per pixel, mean IoU over all
pixels of the validation images, and accuracy. Accuracy within 3 pixels of a border between classes is ours: that is
where upsamplers differ.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densefeat.align import MaskFolder
from pipeline.errors import JobError
from pipeline.evaluate import probe
from pipeline.evaluate.data.comparison import Comparison, Split, counted
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.labels import check_split, labelled_split
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.report.pictures import class_colour, class_colours, photograph
from pipeline.evaluate.task import Figure, Outcome, Panel
from schemas.evaluate_options import EvaluateConfig

__all__ = ["check", "evaluate"]

BORDER_PX = 3


@dataclass(frozen=True, eq=False)
class _Masks:
    """The masks of the images as classes of the probe.

    Attributes:
        folder: of the dataset.
        values: values in the masks, ascending; the number of a class is its place among them.
    """

    folder: MaskFolder
    values: tuple[int, ...]

    def on(self, grid: Grid, key: str) -> Tensor:
        """Classes of an image's points: [m, n] int64, −1 where they are left out."""
        mask = grid.nearest(self.folder(key)).astype(np.int64)
        places = np.searchsorted(self.values, mask).clip(max=len(self.values) - 1)
        return torch.from_numpy(np.where(np.array(self.values)[places] == mask, places, -1))


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse masks that are not there.

    Raises:
        JobError: as described.
    """
    check_split(MaskFolder(str(config.labels)).files, keys, config)


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: there are too few images, labels or classes.
    """
    parts, masks = _prepared(comparison, config)
    draws = probe.Draws(config.runs, len(parts.train), max(1, config.pixels // len(parts.train)), config.seed)
    probes, counts, borders = {}, {}, {}
    for side in comparison.sides:
        chosen = probe.training_pixels(comparison, side, parts.train, masks.on, draws)
        probes[side.name] = [probe.fit_classifier(x, y, len(masks.values)) for x, y in chosen]
        counts[side.name], borders[side.name] = _evaluated(comparison, side, parts.val, masks, probes[side.name])

    def draw(unit: int) -> list[Panel]:
        key = parts.val[unit]
        grid = comparison.grid(key)
        truth = masks.on(grid, key)
        panels = [photograph(comparison, key, grid), Panel("labels", class_colours(truth))]
        for side in comparison.sides:
            predicted = probes[side.name][0](comparison.pixels(side, key, grid)).argmax(1).view(grid.shape)
            panels.append(Panel(side.name, class_colours(predicted.where(truth >= 0, -1))))
        return panels

    return Outcome(
        protocol=(
            f"Linear probe of {len(masks.values)} classes (Oquab et al., DINOv2, TMLR 2024), fitted by L-BFGS to "
            f"{draws.places.shape[2]:,} pixels of each of {counted(len(parts.train), 'image')}, evaluated on all "
            f"labelled pixels of {len(parts.val)} others. {config.runs} runs, each with images and pixels drawn with "
            f"replacement. Split: {parts.described}. Border accuracy: within {BORDER_PX} px of a border between "
            "classes."
        ),
        unit="image",
        units=parts.val,
        figures=[
            Figure("mean IoU", counts, probe.mean_iou),
            Figure("accuracy", counts, probe.accuracy),
            Figure("border accuracy", borders, probe.share),
        ],
        draw=draw,
        details={"classes": masks.values, "iou_of_classes": _of_classes(counts)},
        legend={str(value): class_colour(number) for number, value in enumerate(masks.values)},
    )


def _prepared(comparison: Comparison, config: EvaluateConfig) -> tuple[Split, _Masks]:
    """Split the images that have labels, and choose the classes.

    Raises:
        JobError: there are too few images, labels or classes.
    """
    folder = MaskFolder(str(config.labels))
    pixels: dict[str, Counter[int]] = {}

    def usable(key: str, mask: npt.NDArray[Any]) -> bool:
        values, counts = np.unique(mask.astype(np.int64), return_counts=True)
        found = dict(zip(values.tolist(), counts.tolist(), strict=True))
        pixels[key] = Counter({value: count for value, count in found.items() if value not in config.ignore})
        return bool(pixels[key])

    whole = labelled_split(comparison, folder, usable, config)
    in_train, in_val = (sum((pixels[key] for key in part), Counter[int]()) for part in (whole.train, whole.val))
    values = tuple(sorted(value for value, _ in in_train.most_common(config.classes)))
    if len(values) < 2:
        ignored = ", ".join(map(str, config.ignore)) or "none"
        raise JobError(
            f"--labels: the training images have the classes {values}, expected two or more; values left out by "
            f"--ignore: {ignored}"
        )
    if lost := {value: count for value, count in in_val.items() if value not in values}:
        comparison.notes.append(
            f"{len(lost)} of the validation images' classes are not among those of the probe: their pixels are left "
            f"out ({sum(lost.values()) / in_val.total():.1%} of the labelled pixels)"
        )
    parts = [
        tuple(key for key in part if not pixels[key].keys().isdisjoint(values)) for part in (whole.train, whole.val)
    ]
    if without := len(whole.train) + len(whole.val) - len(parts[0]) - len(parts[1]):
        comparison.notes.append(f"{counted(without, 'image')} left out: no pixel of the probe's classes")
    if not parts[1]:
        raise JobError("--labels: no class of the training images occurs in the validation images")
    if absent := [value for value in values if value not in in_val]:
        comparison.notes.append(f"{len(absent)} of the classes do not occur in the validation images: no IoU")
    return Split(parts[0], parts[1], whole.described), _Masks(folder, values)


def _evaluated(
    comparison: Comparison, side: Side, keys: Sequence[str], masks: _Masks, classifiers: Sequence[probe.Linear]
) -> tuple[Tensor, Tensor]:
    """`probe.class_counts` [R, P, classes, 3]; pixels near borders, right and all [R, P, 2]."""
    counts, borders = [], []
    for key in keys:
        grid = comparison.grid(key)
        classes = masks.on(grid, key)
        known, edge = (classes >= 0).flatten(), probe.near_borders(classes, BORDER_PX).flatten()
        truth, at_edge = classes.flatten()[known], edge[known]
        pixels = comparison.pixels(side, key, grid)[known]
        predicted = [classifier(pixels).argmax(1) for classifier in classifiers]
        counts.append(torch.stack([probe.class_counts(one, truth, len(masks.values)) for one in predicted]))
        right = torch.stack([(one == truth)[at_edge].sum() for one in predicted])
        borders.append(torch.stack([right, at_edge.sum().expand_as(right)], 1))
    return torch.stack(counts, 1), torch.stack(borders, 1)


def _of_classes(counts: dict[str, Tensor]) -> dict[str, list[float | None]]:
    """Intersection over union of each class, all images and runs together; None for a class without labels."""
    found: dict[str, list[float | None]] = {}
    for side, own in counts.items():
        right, truth, predicted = own.sum((0, 1)).double().unbind(1)
        iou = (right / (truth + predicted - right)).tolist()
        found[side] = [round(one, 5) if labels else None for one, labels in zip(iou, truth.tolist(), strict=True)]
    return found
