"""Semantic correspondence of keypoints.

The protocol of PF-WILLOW and SPair-71k (Ham et al., Proposal Flow, TPAMI 2018; Min et al., SPair-71k, 2019) without any
training: every keypoint of a source image goes to the most similar pixel of a target image, by the cosine of the
features. PCK@α is the share of keypoints that arrive within α × the larger side of the box around the target's
keypoints, or of the target image. As in PF-WILLOW, the box is that of the keypoints.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import JobError
from pipeline.evaluate import probe
from pipeline.evaluate.data.comparison import Comparison, counted, spread
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.labels import read_keypoints
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.evaluate.report.pictures import photograph, with_points
from pipeline.evaluate.task import Figure, Outcome, Panel
from schemas.evaluate_options import EvaluateConfig

__all__ = ["check", "evaluate"]

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Image:
    """An image with keypoints.

    Attributes:
        key: of the image.
        grid: of the image.
        points: [n, 2] (x, y) in pixels of the original; NaN where there is none, or not within the grid.
        lengths: larger side of the box around the keypoints on the image, and of the image, in pixels of the original.
    """

    key: str
    grid: Grid
    points: Points
    lengths: tuple[float, float]

    @classmethod
    def of(cls, key: str, grid: Grid, points: Points) -> "_Image":
        places = grid.points(points)
        inside, on_image = _within(places, grid.shape), _within(points, grid.image_size)
        box = np.ptp(points[on_image], 0).max() if on_image.any() else 0
        return cls(key, grid, np.where(inside[:, None], points, np.nan), (float(box), float(max(grid.image_size))))

    def descriptors(self, side: Side, comparison: Comparison) -> Tensor:
        """Features at the keypoints, bilinear between pixels: [n, k + 1]; those of missing points mean nothing."""
        unit = side.unit_channels(comparison.features(side, self.key, self.grid))
        height, width = self.grid.shape
        size = torch.tensor([width, height], dtype=torch.float64)
        places = torch.from_numpy(np.nan_to_num(self.grid.points(self.points))) * 2 / size - 1
        sampled = F.grid_sample(unit[None], places.float()[None, None], padding_mode="border", align_corners=False)
        return F.normalize(sampled[0, :, 0], dim=0).T

    def nearest(self, side: Side, comparison: Comparison, descriptors: Tensor) -> Points:
        """The most similar pixels of this image, [n, 2] (x, y) in pixels of the original."""
        unit = side.unit_channels(comparison.features(side, self.key, self.grid)).flatten(1)
        rows, columns = np.divmod((descriptors @ unit).argmax(1).numpy(), self.grid.shape[1])
        return np.stack([self.grid.xs[columns], self.grid.ys[rows]], 1)


def check(config: EvaluateConfig, sides: Sequence[PlannedSide], keys: Sequence[str]) -> None:
    """Refuse keypoints of other images, and images without a pair.

    Raises:
        JobError: none of the images has keypoints, no two have some in common, or the file cannot be read.
    """
    listed = read_keypoints(str(config.labels))
    points = {key: listed[key] for key in spread(_with_keypoints(listed, keys, config), config.limit)}
    if not any(found for _, found in _targets(points, config.same_folder)):
        raise JobError(_why_no_pair(points, config, ()))


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: no two images have keypoints in common.
    """
    images = _images(comparison, config)
    points = {key: one.points for key, one in images.items()}
    targets = dict(_targets(points, config.same_folder))
    sources = [key for key in images if targets[key]]
    if not sources:
        raise JobError(_why_no_pair(points, config, comparison.notes))
    if unlike := _of_other_lengths(points, config.same_folder):
        comparison.notes.append(
            f"{counted(unlike, 'pair')} left out: their lists have different lengths; point i corresponds to point i, "
            "null where there is none"
        )
    unpaired = {key: counted(len(one.points), "point") for key, one in images.items() if not targets[key]}
    comparison.left_out(unpaired, "no keypoint in common with another image")
    hits = {side.name: _hits(comparison, side, images, targets, sources, config.alphas) for side in comparison.sides}
    main = len(config.alphas) // 2
    order = [main, *(i for i in range(len(config.alphas)) if i != main)]
    figures = [
        Figure(
            f"PCK@{config.alphas[i]:g} of the {kind}",
            {side: own[:, :, i, j] for side, own in hits.items()},
            probe.share,
        )
        for j, kind in enumerate(("box", "image"))
        for i in order
    ]

    def draw(unit: int) -> list[Panel]:
        source = images[sources[unit]]
        target = images[targets[source.key][0]]
        common = _in_common(source.points, target.points)
        photo = photograph(comparison, source.key, source.grid)
        panels = [with_points(photo, source.grid.points(source.points[common]))]
        for side in comparison.sides:
            found = target.nearest(side, comparison, source.descriptors(side, comparison))[common]
            photo = photograph(comparison, target.key, target.grid)
            places = target.grid.points(found), target.grid.points(target.points[common])
            distance = np.linalg.norm(found - target.points[common], axis=1)
            right = int((distance <= config.alphas[main] * target.lengths[0]).sum())
            caption = f"{side.name}, to {target.key}: {right} of {len(found)} within {config.alphas[main]:g} of the box"
            panels.append(Panel(caption, with_points(photo, *places).pixels))
        return panels

    pairs = sum(map(len, targets.values()))
    return Outcome(
        protocol=(
            "Keypoints of a source image go to the most similar pixels of a target image, without training (Ham et "
            f"al., Proposal Flow, TPAMI 2018; Min et al., SPair-71k, 2019): {counted(pairs, 'pair')} of "
            f"{counted(len(images), 'image')}"
            + (" whose keys have the same first folder" if config.same_folder else "")
            + ". PCK@α: share of the points within α × the larger side of the box around the target's keypoints, or of "
            "the target image. In the pictures, rings are the labels, and lines go to the points found."
        ),
        unit="source image",
        units=sources,
        figures=figures,
        draw=draw,
    )


def _images(comparison: Comparison, config: EvaluateConfig) -> dict[str, _Image]:
    """Images with features and keypoints, by key."""
    listed = read_keypoints(str(config.labels))
    found = _with_keypoints(listed, comparison.keys, config)
    labelled, known = set(found), set(comparison.keys)
    comparison.left_out({key: "no keypoints" for key in comparison.keys if key not in labelled}, "no labels")
    unknown = {key: "no such row" for key in listed if key not in known}
    comparison.left_out(unknown, "keypoints without features")
    images = {key: _Image.of(key, comparison.grid(key), listed[key]) for key in spread(found, config.limit)}
    hidden = sum(int((np.isfinite(listed[key]) & np.isnan(one.points)).any(1).sum()) for key, one in images.items())
    if hidden:
        comparison.notes.append(
            f"{counted(hidden, 'keypoint')} left out: outside of the features; --fit pad keeps all within the image"
        )
    if boxless := sum(one.lengths[0] == 0 and bool(np.isfinite(one.points).any()) for one in images.values()):
        comparison.notes.append(
            f"{counted(boxless, 'image')} with keypoints at one place only: their box has no size, and no point is "
            "within a share of it"
        )
    return images


def _within(points: Points, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Which points (x, y) [n, 2] are within an area of (height, width): [n]; those that are NaN are not."""
    height, width = size
    return np.asarray((points >= 0).all(1) & (points[:, 0] <= width) & (points[:, 1] <= height))


def _with_keypoints(listed: Mapping[str, Points], keys: Sequence[str], config: EvaluateConfig) -> list[str]:
    """Those of ``keys`` that have keypoints.

    Raises:
        JobError: none has.
    """
    found = [key for key in keys if key in listed and np.isfinite(listed[key]).any()]
    if not found:
        raise JobError(
            f"--labels {config.labels}: no image with features has keypoints: keys look like "
            f"{next(iter(listed), 'none')!r}, those of the features like {keys[0]!r}"
        )
    return found


def _in_common(source: Points, target: Points) -> npt.NDArray[np.bool_]:
    """Which keypoints both have: [n]."""
    return np.asarray(~np.isnan(source + target).any(1))


def _why_no_pair(points: Mapping[str, Points], config: EvaluateConfig, notes: Sequence[str]) -> str:
    found = f"--labels {config.labels}: no two of {counted(len(points), 'image')} have keypoints in common"
    reasons = ["--limit leaves one"] if len(points) == 1 == config.limit else []
    if len(points) > 1 and config.same_folder and len({_folder(key) for key in points}) == len(points):
        reasons.append("every image is alone in its folder: pass --no-same-folder to pair all")
    if len({len(one) for one in points.values()}) > 1:
        reasons.append("their lists have different lengths: point i corresponds to point i, null where there is none")
    return "; ".join([found, *reasons, *notes])


def _folder(key: str) -> str:
    return key.split("/")[0]


def _targets(points: Mapping[str, Points], same_folder: bool) -> Iterator[tuple[str, list[str]]]:
    """Every source image with its target images; those next in the order come first."""
    keys = list(points)
    for place, key in enumerate(keys):
        others = keys[place + 1 :] + keys[:place]
        found = [
            other
            for other in others
            if not same_folder or _folder(other) == _folder(key)
            if len(points[other]) == len(points[key]) and _in_common(points[key], points[other]).any()
        ]
        yield key, found


def _of_other_lengths(points: Mapping[str, Points], same_folder: bool) -> int:
    """Number of pairs, of a source and a target, whose lists have different lengths."""
    lengths = Counter((_folder(key) if same_folder else "", len(one)) for key, one in points.items())
    images = Counter[str]()
    for (folder, _), count in lengths.items():
        images[folder] += count
    return sum(count * (images[folder] - count) for (folder, _), count in lengths.items())


def _hits(
    comparison: Comparison,
    side: Side,
    images: Mapping[str, _Image],
    targets: Mapping[str, Sequence[str]],
    sources: Sequence[str],
    alphas: Sequence[float],
) -> Tensor:
    """Keypoints that arrive, and all, of every source image: [1, P, alphas, box or image, 2]."""
    described = {key: images[key].descriptors(side, comparison) for key in sources}
    hits = torch.zeros(1, len(sources), len(alphas), 2, 2, dtype=torch.int64)
    for target in images.values():
        own = [unit for unit, key in enumerate(sources) if target.key in targets[key]]
        if not own:
            continue
        found = target.nearest(side, comparison, torch.cat([described[sources[unit]] for unit in own]))
        for unit, places in zip(own, np.split(found, len(own)), strict=True):
            common = _in_common(images[sources[unit]].points, target.points)
            distance = np.linalg.norm(places - target.points, axis=1)[common]
            for i, alpha in enumerate(alphas):
                for j, length in enumerate(target.lengths):
                    near = distance <= alpha * length if length else np.zeros(len(distance), np.bool_)
                    hits[0, unit, i, j] += torch.tensor([int(near.sum()), len(distance)])
    return hits
