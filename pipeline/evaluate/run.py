"""Carry out an evaluation: open the sides, run the task, write the report."""

import json
from collections.abc import Callable
from dataclasses import asdict

from densefeat.storage.objects import Objects
from pipeline.evaluate import (
    activation_maps,
    depth,
    discovery,
    held_out,
    keypoints,
    reconstruction,
    segmentation,
    video,
)
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.labels import DepthFolder, first_file, read_keypoints
from pipeline.evaluate.data.originals import weights_missing
from pipeline.evaluate.data.sides import open_sides, parse_side
from pipeline.evaluate.report.page import page
from pipeline.evaluate.report.result import Result
from pipeline.evaluate.task import Outcome
from pipeline.io.storage import check_writable, storage_explained
from schemas.evaluate_options import UNLABELLED, EvaluateConfig, TaskName

__all__ = ["TASKS", "evaluate"]

TASKS: dict[TaskName, Callable[[Comparison, EvaluateConfig], Outcome]] = {
    "segmentation": segmentation.evaluate,
    "depth": depth.evaluate,
    "keypoints": keypoints.evaluate,
    "video": video.evaluate,
    "discovery": discovery.evaluate,
    "activation_maps": activation_maps.evaluate,
    "held_out_views": held_out.evaluate,
    "reconstruction": reconstruction.evaluate,
}


def _check_features(config: EvaluateConfig) -> None:
    """Refuse features that the task cannot use, as far as --features tells.

    Raises:
        JobError: as described.
    """
    sides = [parse_side(text) for text in config.features]
    if config.task == "activation_maps":
        for side in sides:
            if side.store is None and side.options.get("space") != "head":
                raise activation_maps.not_scores(side.name)
    if config.task in UNLABELLED and config.weights is None:
        for side in sides:
            if side.store is not None:
                raise weights_missing(side.name)


def _check_labels(config: EvaluateConfig) -> None:
    """Refuse labels that cannot be read.

    Raises:
        JobError: there are none, or they are not those of the task.
    """
    if config.labels is None:
        return
    with storage_explained(f"--labels {config.labels}", "read"):
        if config.task == "keypoints":
            read_keypoints(config.labels)
        elif config.task == "depth":
            DepthFolder(config.labels, config.depth_scale, config.depth_range).check()
        else:
            first_file(Objects(config.labels), ".png")


def evaluate(config: EvaluateConfig) -> Result:
    """Run a task and write its report.

    Raises:
        JobError: it cannot be done as requested.
        StoreError: a store is missing or damaged.
        StorageUnavailable: the storage does not answer.
    """
    report = Objects(config.report)
    check_writable(report, f"--report {config.report}")  # before the work, as all that follows
    _check_features(config)
    _check_labels(config)
    with open_sides(config.features, config.images, config.stores) as sides:
        comparison = Comparison(sides)
        result = Result.of(config.task, TASKS[config.task](comparison, config), comparison)
        document = json.dumps(result.to_dict(asdict(config)), indent=1, ensure_ascii=False, allow_nan=False)
        drawn = page(result, config.shown)
        with storage_explained(f"--report {config.report}"):
            report.put("report.json", document.encode())
            report.put("report.html", drawn.encode())
    return result
