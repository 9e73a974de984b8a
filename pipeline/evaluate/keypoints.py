"""Semantic correspondence of keypoints.

The protocol of PF-WILLOW and SPair-71k (Ham et al., Proposal Flow, TPAMI 2018; Min et al., SPair-71k, 2019) without any
training: every keypoint of a source image goes to the most similar pixel of a target image, by the cosine of the
features. PCK@α is the share of keypoints that arrive within α × the larger side of the box around the target's
keypoints, or of the target image. As in PF-WILLOW, the box is that of the keypoints.
"""

from collections.abc import Mapping, Sequence
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
        lengths: larger side of the box around all keypoints, and of the image, in pixels of the original.
    """

    key: str
    grid: Grid
    points: Points
    lengths: tuple[float, float]

    @classmethod
    def of(cls, key: str, grid: Grid, points: Points) -> "_Image":
        places = grid.points(points)
        height, width = grid.shape
        with np.errstate(invalid="ignore"):
            inside = (places >= 0).all(1) & (places[:, 0] <= width) & (places[:, 1] <= height)
        box = np.nanmax(points, 0) - np.nanmin(points, 0)
        return cls(
            key, grid, np.where(inside[:, None], points, np.nan), (float(box.max()), float(max(grid.image_size)))
        )

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
    """Refuse keypoints of other images.

    Raises:
        JobError: none of the images has keypoints, or the file cannot be read.
    """
    _with_keypoints(read_keypoints(str(config.labels)), keys, config)


def evaluate(comparison: Comparison, config: EvaluateConfig) -> Outcome:
    """Run the task.

    Raises:
        JobError: no two images have keypoints in common.
    """
    images = _images(comparison, config)
    targets = _targets(images, config.same_folder)
    sources = [key for key in images if targets[key]]
    if not sources:
        raise JobError(_why_no_pair(comparison, images, config))
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
        common = _in_common(source, target)
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
    if boxless := sum(one.lengths[0] == 0 for one in images.values()):
        comparison.notes.append(
            f"{counted(boxless, 'image')} with keypoints at one place only: their box has no size, and no point is "
            "within a share of it"
        )
    return images


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


def _in_common(source: _Image, target: _Image) -> npt.NDArray[np.bool_]:
    """Which keypoints both have: [n]."""
    return np.asarray(~np.isnan(source.points + target.points).any(1))


def _why_no_pair(comparison: Comparison, images: Mapping[str, _Image], config: EvaluateConfig) -> str:
    found = f"--labels {config.labels}: no two of {counted(len(images), 'image')} have keypoints in common"
    reasons = []
    if config.same_folder and len({key.split("/")[0] for key in images}) == len(images):
        reasons.append("every image is alone in its folder: pass --no-same-folder to pair all")
    if len({len(one.points) for one in images.values()}) > 1:
        reasons.append("their lists have different lengths: point i corresponds to point i, null where there is none")
    return "; ".join([found, *reasons, *comparison.notes])


def _targets(images: Mapping[str, _Image], same_folder: bool) -> dict[str, list[str]]:
    """For every source image, the target images; those next in the order come first."""
    keys = list(images)
    targets: dict[str, list[str]] = {}
    for place, key in enumerate(keys):
        others = keys[place + 1 :] + keys[:place]
        own = images[key].points
        targets[key] = [
            other
            for other in others
            if not same_folder or other.split("/")[0] == key.split("/")[0]
            if len(images[other].points) == len(own) and _in_common(images[key], images[other]).any()
        ]
    return targets


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
            distance = np.linalg.norm(places - target.points, axis=1)[_in_common(images[sources[unit]], target)]
            for i, alpha in enumerate(alphas):
                for j, length in enumerate(target.lengths):
                    hits[0, unit, i, j] += torch.tensor([int((distance <= alpha * length).sum()), len(distance)])
    return hits
