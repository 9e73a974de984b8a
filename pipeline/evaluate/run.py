"""Carry out an evaluation: open the sides, run the task, write the report."""

import json
from collections.abc import Sequence
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
from pipeline.evaluate.data.comparison import Comparison, common_keys
from pipeline.evaluate.data.sides import PlannedSide, open_sides
from pipeline.evaluate.report.page import page
from pipeline.evaluate.report.result import Result
from pipeline.evaluate.task import Task
from pipeline.io.storage import check_writable, storage_explained
from schemas.evaluate_options import EvaluateConfig, TaskName

__all__ = ["TASKS", "evaluate"]

_UNDECODABLE = "backslashreplace"  # bytes of a path or name that are no text; in JSON that is how to write them

TASKS: dict[TaskName, Task] = {
    "segmentation": Task(segmentation.check, segmentation.evaluate),
    "depth": Task(depth.check, depth.evaluate),
    "keypoints": Task(keypoints.check, keypoints.evaluate),
    "video": Task(video.check, video.evaluate),
    "discovery": Task(discovery.check, discovery.evaluate),
    "activation_maps": Task(activation_maps.check, activation_maps.evaluate),
    "held_out_views": Task(held_out.check, held_out.evaluate),
    "reconstruction": Task(reconstruction.check, reconstruction.evaluate),
}


def evaluate(config: EvaluateConfig) -> Result:
    """Run a task and write its report.

    Raises:
        JobError: it cannot be done as requested.
        StoreError: a store is missing or damaged.
        StorageUnavailable: the storage does not answer.
    """
    report = Objects(config.report)
    check_writable(report, f"--report {config.report}")  # before the work, as all that follows
    task = TASKS[config.task]

    def check(sides: Sequence[PlannedSide]) -> None:
        with storage_explained(f"--labels {config.labels}", "read"):
            task.check(config, sides, common_keys({side.name: side.keys for side in sides}))

    with open_sides(config.features, config.images, config.stores, check) as sides:
        comparison = Comparison(sides)
        result = Result.of(config.task, task.evaluate(comparison, config), comparison)
        document = json.dumps(result.to_dict(asdict(config)), indent=1, ensure_ascii=False, allow_nan=False)
        drawn = page(result, config.shown)
        with storage_explained(f"--report {config.report}"):
            report.put("report.json", document.encode(errors=_UNDECODABLE))
            report.put("report.html", drawn.encode(errors=_UNDECODABLE))
    return result
