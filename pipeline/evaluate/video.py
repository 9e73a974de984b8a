"""Video object segmentation by label propagation.

The protocol of DINO on DAVIS (Caron et al., ICCV 2021; Jabri et al., NeurIPS 2020), without training: the mask of the
first frame is propagated frame by frame. A cell takes the labels of its 5 most similar cells, weighted by exp(cosine /
0.1), out of those within a window in the first frame and the 7 frames before it. J is the intersection over union of
an object, F the boundary measure of DAVIS (Perazzi et al., CVPR 2016); both are means over the frames but the first and
the last, and over objects.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from densefeat.align import MaskFolder
from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import Comparison, counted, spread
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.labels import first_labelled
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.report.pictures import overlaid, photograph
from pipeline.evaluate.task import Figure, Outcome, Panel
from schemas.evaluate_options import EvaluateConfig

__all__ = ["boundary_measure", "check", "evaluate", "propagate", "region_similarity"]

_FRAMES, _NEIGHBOURS, _TEMPERATURE = 7, 5, 0.1
_WINDOW = 12 / 60  # of the rows of the grid: 12 of DINO's 60
_TILE = (4, 16)  # rows and columns that are propagated at once: their windows overlap
_LEAST_FRAMES = 3  # of a sequence: the first and the last are not evaluated
_TOLERANCE = 0.008  # of the image's diagonal, for boundaries

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Sequence:
    """A sequence of frames.

    Attributes:
        name: folder of the frames.
        keys: of the frames, in order.
        grid: of every frame.
        first: mask of the first frame in the pixels of the grid [m, n], 0: background, 1 …: objects.
        objects: values of the objects in the masks.
        evaluated: keys of the frames to measure: those with a mask but the first and the last, as DAVIS.
    """

    name: str
    keys: tuple[str, ...]
    grid: Grid
    first: Tensor
    objects: tuple[int, ...]
    evaluated: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The frame of the pictures, about two thirds of the way."""
        return self.evaluated[2 * len(self.evaluated) // 3]


@dataclass(frozen=True, eq=False)
class _Tracked:
    """Result of a sequence: sums of J and of F over objects, and objects [3]; and the objects of one frame [m, n]."""

    counts: Tensor
    shown: Tensor


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse masks that are not there, and folders with too few frames.

    Raises:
        JobError: as described.
    """
    sequences = _frames(keys, config.limit)
    if max(map(len, sequences.values())) < _LEAST_FRAMES:
        name, frames = next(iter(sequences.items()))
        raise JobError(
            f"--features: no folder has {_LEAST_FRAMES} frames or more, as a sequence must have; {name}/ has "
            f"{len(frames)}, such as {frames[0]}"
        )
    first_labelled(MaskFolder(str(config.labels)).files, [frames[0] for frames in sequences.values()], "sequences")


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: no sequence has masks.
    """
    masks = MaskFolder(str(config.labels))
    sequences = _sequences(comparison, masks, config.limit)
    tracked = {
        side.name: [_tracked(comparison, side, sequence, masks, config.video_rows) for sequence in sequences]
        for side in comparison.sides
    }
    counts = {side: torch.stack([one.counts for one in own])[None] for side, own in tracked.items()}

    def draw(unit: int) -> list[Panel]:
        sequence = sequences[unit]
        key = sequence.shown
        photo = photograph(comparison, key, sequence.grid)
        truth = torch.from_numpy(_numbered(sequence.grid.nearest(masks(key)), sequence.objects))
        panels = [photo, Panel("labels", overlaid(photo, truth))]
        return panels + [Panel(side, overlaid(photo, own[unit].shown)) for side, own in tracked.items()]

    return Outcome(
        protocol=(
            "The mask of the first frame is propagated to the nearest neighbours within a window (Caron et al., DINO, "
            f"ICCV 2021) on a grid of {config.video_rows} rows, without training: "
            f"{counted(len(sequences), 'sequence')}, {sum(len(sequence.keys) for sequence in sequences)} frames. J "
            "and F of DAVIS (Perazzi et al., CVPR 2016) at the resolution of the masks, where features see the frame."
        ),
        unit="sequence",
        units=[sequence.name for sequence in sequences],
        figures=[Figure("J&F", counts, _mean_of_both), Figure("J", counts, _mean_j), Figure("F", counts, _mean_f)],
        draw=draw,
    )


def _mean_j(counts: Tensor) -> Tensor:
    return counts[:, 0] / counts[:, 2]


def _mean_f(counts: Tensor) -> Tensor:
    return counts[:, 1] / counts[:, 2]


def _mean_of_both(counts: Tensor) -> Tensor:
    return (_mean_j(counts) + _mean_f(counts)) / 2


def _sequences(comparison: Comparison, masks: MaskFolder, limit: int | None) -> list[_Sequence]:
    """The sequences whose first frame has objects, and that have masks of later frames.

    Raises:
        JobError: there is none.
    """
    found, reasons = [], dict[str, str]()
    for name, keys in _frames(comparison.keys, limit).items():
        try:
            found.append(_sequence(comparison, masks, name, keys))
        except (OSError, ValueError) as error:
            reasons[name] = str(error)
    comparison.left_out(reasons, "cannot be tracked", "sequence")
    if not found:
        raise JobError(f"--labels: no sequence can be tracked; the first: {next(iter(reasons.values()))}")
    return found


def _frames(keys: Sequence[str], limit: int | None) -> dict[str, tuple[str, ...]]:
    """Keys of the frames of ``limit`` sequences in their order, by folder."""
    frames: dict[str, list[str]] = {}
    for key in keys:
        frames.setdefault(str(PurePosixPath(key).parent), []).append(key)
    return {name: tuple(sorted(frames[name], key=_by_numbers)) for name in spread(list(frames), limit)}


def _by_numbers(key: str) -> tuple[list[str | int], str]:
    """For sorting: numbers by their value, so that frame 2 is before frame 10."""
    parts = re.split(r"(\d+)", key)  # each second one is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], key


def _sequence(comparison: Comparison, masks: MaskFolder, name: str, keys: tuple[str, ...]) -> _Sequence:
    if len(keys) < _LEAST_FRAMES:
        raise ValueError(f"has {counted(len(keys), 'frame')}, expected {_LEAST_FRAMES} or more")
    grids = [comparison.grid(key) for key in keys]
    if len({(grid.image_size, grid.shape) for grid in grids}) > 1:
        raise ValueError("its frames have different sizes")
    mask = masks(keys[0])
    first = grids[0].nearest(mask)
    objects = tuple(int(value) for value in np.unique(first) if value)
    if not objects:
        raise ValueError(f"the mask of its first frame, {keys[0]}, has no object")
    if lost := set(np.unique(mask).tolist()) - {0, *objects}:
        comparison.notes.append(
            f"{name}: {counted(len(lost), 'object')} of the first frame left out: outside of the features, or smaller "
            "than a pixel of them"
        )
    if missing := set(masks.missing(keys[1:-1])):
        comparison.notes.append(f"{name}: {counted(len(missing), 'frame')} without a mask: not evaluated")
        if len(missing) == len(keys) - 2:
            raise ValueError("no frame between the first and the last has a mask")
    evaluated = tuple(key for key in keys[1:-1] if key not in missing)
    for key in evaluated:
        try:
            grids[0].nearest(masks(key))
        except (OSError, ValueError) as error:
            raise ValueError(f"the mask of {key} cannot be used: {error}") from error
    return _Sequence(name, keys, grids[0], torch.from_numpy(_numbered(first, objects)), objects, evaluated)


def _numbered(mask: npt.NDArray[np.integer], objects: Sequence[int]) -> npt.NDArray[np.int64]:
    """Objects as 1 …, all else as 0."""
    return sum(
        (np.where(mask == value, number, 0) for number, value in enumerate(objects, 1)), np.zeros(mask.shape, np.int64)
    )


def _tracked(comparison: Comparison, side: Side, sequence: _Sequence, masks: MaskFolder, rows: int) -> _Tracked:
    """Propagate the first mask through a sequence, and measure it."""
    grid = sequence.grid
    cells = min(rows, grid.shape[0]), min(max(1, round(rows * grid.shape[1] / grid.shape[0])), grid.shape[1])
    radius = max(1, round(_WINDOW * cells[0]))
    one_hot = F.one_hot(sequence.first, len(sequence.objects) + 1).permute(2, 0, 1).float()
    memory: list[tuple[Tensor, Tensor]] = []  # features and labels of the frames before; the first stays
    sums, evaluated = torch.zeros(2, dtype=torch.float64), set(sequence.evaluated)
    shown = sequence.first
    for key in sequence.keys:
        features = _cells(side, comparison.features(side, key, grid), cells)
        if not memory:
            memory.append((features, F.adaptive_avg_pool2d(one_hot, cells)))
            continue
        labels = propagate(features, memory, radius)
        memory = [memory[0], *memory[1:][-(_FRAMES - 1) :], (features, labels)]
        if key == sequence.shown:
            shown = _objects(labels, grid.shape)
        if key in evaluated:
            sums += _measured(labels, grid, masks(key), sequence.objects)
    counts = torch.cat([sums / len(evaluated), torch.tensor([float(len(sequence.objects))], dtype=torch.float64)])
    return _Tracked(counts, shown)


def _cells(side: Side, features: Tensor, cells: tuple[int, int]) -> Tensor:
    """Features averaged over the cells of a coarser grid, of length 1: [k + 1, r, c]."""
    return side.unit_channels(F.adaptive_avg_pool2d(features, cells))


def propagate(features: Tensor, memory: Sequence[tuple[Tensor, Tensor]], radius: int) -> Tensor:
    """Labels of a frame from those of frames before it.

    Args:
        features: [d, r, c], of length 1.
        memory: of each frame before, features [d, r, c] and labels [l, r, c].
        radius: cells further away in a row or column are not looked at.

    Returns:
        [l, r, c]; sums over l are 1 where those of the memory are.
    """
    _, rows, columns = features.shape
    keys = torch.stack([one for one, _ in memory], 1)  # [d, f, r, c]
    values = torch.stack([labels for _, labels in memory], 1)  # [l, f, r, c]
    found = torch.empty(len(values), rows, columns)
    for top, left in itertools.product(range(0, rows, _TILE[0]), range(0, columns, _TILE[1])):
        own = slice(top, min(top + _TILE[0], rows)), slice(left, min(left + _TILE[1], columns))
        near = tuple(slice(max(0, one.start - radius), one.stop + radius) for one in own)
        cosines = features[:, *own].flatten(1).T @ keys[:, :, *near].flatten(1)
        outside = _outside(own, near, (rows, columns), radius)
        cosines = cosines.view(len(outside), len(memory), -1).masked_fill(outside[:, None], -torch.inf).flatten(1)
        highest, places = cosines.topk(min(_NEIGHBOURS, cosines.shape[1]), 1)
        weights = torch.softmax(highest / _TEMPERATURE, 1)
        labels = values[:, :, *near].flatten(1)[:, places]
        found[:, *own] = (labels * weights).sum(2).view(len(values), own[0].stop - top, own[1].stop - left)
    return found


def _outside(own: tuple[slice, slice], near: tuple[slice, ...], size: tuple[int, int], radius: int) -> Tensor:
    """Which cells of ``near`` are out of reach, for each cell of ``own``: [own, near] bool."""
    apart = []
    for i in range(2):
        here, there = (torch.arange(*one.indices(size[i])) for one in (own[i], near[i]))
        apart.append((here[:, None] - there).abs() > radius)
    return (apart[0][:, None, :, None] | apart[1][None, :, None, :]).flatten(2).flatten(0, 1)


def _objects(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The object of every pixel, 0 for the background; every label is first stretched to 0 … 1, as in DINO."""
    large = F.interpolate(labels[None], size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (large - low) / (high - low).clamp(min=1e-12), large)
    return stretched.argmax(0)


def _measured(labels: Tensor, grid: Grid, mask: npt.NDArray[np.integer], objects: Sequence[int]) -> Tensor:
    """Sums of J and F over objects [2], in those pixels of the original that the grid covers."""
    (top, bottom), (left, right) = grid.extent
    part = mask[top:bottom, left:right]
    predicted = _objects(labels, part.shape).numpy()
    pairs = [(predicted == number, part == value) for number, value in enumerate(objects, 1)]
    js, fs = (sum(measure(*pair) for pair in pairs) for measure in (region_similarity, boundary_measure))
    return torch.tensor([js, fs], dtype=torch.float64)


def region_similarity(predicted: Mask, truth: Mask) -> float:
    """J of DAVIS: intersection over union; 1 if both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary_measure(predicted: Mask, truth: Mask) -> float:
    """F of DAVIS: from precision and recall of the pixels on the boundary, matched within 0.008 of the diagonal."""
    radius = math.ceil(_TOLERANCE * math.hypot(*truth.shape))
    own, other = _boundary(predicted), _boundary(truth)
    if not own.any() or not other.any():
        return float(own.any() == other.any())
    precision = float(_dilated(other, radius)[own].mean())
    recall = float(_dilated(own, radius)[other].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: Mask) -> Mask:
    """Pixels that differ from the one to the right, below, or diagonally below right."""
    inside = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = inside[:-1, :-1]
    return np.asarray((here != inside[:-1, 1:]) | (here != inside[1:, :-1]) | (here != inside[1:, 1:]))


def _dilated(boundary: Mask, radius: int) -> Mask:
    """Pixels within ``radius`` of the boundary."""
    height, width = boundary.shape
    # Boundary pixels before a place in the row, with a margin: a disk is a run of pixels in each of its rows.
    before = np.pad(boundary, ((radius, radius), (radius + 1, radius))).cumsum(1, dtype=np.int32)
    found = np.zeros(boundary.shape, dtype=np.bool_)
    for dy in range(-radius, radius + 1):
        reach = math.isqrt(radius**2 - dy**2)
        rows = before[radius + dy : radius + dy + height]
        first, last = radius - reach, radius + 1 + reach
        found |= rows[:, last : last + width] > rows[:, first : first + width]
    return found
