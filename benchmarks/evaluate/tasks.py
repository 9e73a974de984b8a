"""Claim: what upsamplers gain on each task of jobs/evaluate.py, for three small backbones.

    python -m benchmarks.train.training --folder trainings      # weights for lift, and for "jbu, trained"
    python -m benchmarks.evaluate.tasks --stores FOLDER
    python -m benchmarks.evaluate.tasks --stores FOLDER --backbones lite0 --tasks video --methods bilinear jbu

The job computes the features with the main job's default layers and 64 components, keeps them in ``--stores``, and
finds them there the next time. The data are coco200, nyu120, willow and davis5.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import rows
from benchmarks.upsamplers.held_out import BACKBONES, SHARED
from pipeline.evaluate.report.result import Result
from pipeline.evaluate.run import evaluate
from schemas.evaluate_options import EvaluateConfig, TaskName

DATA = SHARED / "data"
COMPONENTS = 64
BASELINE = "bilinear"
# In the order of the tables.
METHODS = {
    "bilinear": "upsampler=bilinear",
    "jbu": "upsampler=jbu",
    "jbu, wide kernels": "upsampler=jbu,jbu_kernels=wide",
    "jbu, trained": "upsampler=jbu,upsampler_weights={trainings}/jbu_on_lite0/upsampler.safetensors",
    "jbu, trained on solutions": "upsampler=jbu,upsampler_weights={trainings}/jbu_on_solutions/upsampler.safetensors",
    "lift": "upsampler=lift,upsampler_weights={trainings}/lift_on_{backbone}/upsampler.safetensors",
    "anyup": f"upsampler=anyup,upsampler_weights={SHARED / 'weights' / 'anyup_multi_backbone.pth'}",
    "bilinear, image at 2×": "upsampler=bilinear",
    "multiview, 5 views": "upsampler=multiview,views=5",
    "multiview": "upsampler=multiview",
    "multiview, not smoothed": "upsampler=multiview,smoothing=0",
    "multiview, 21 views": "upsampler=multiview,views=21",
}


@dataclass(frozen=True)
class Case:
    """A task and its data.

    Attributes:
        images: folder.
        size: of the images and of the features, as for --size.
        options: of the job.
        fit: as for --fit.
        other_sizes: by backbone, for one whose patches do not divide ``size``.
    """

    images: str
    size: str = "224"
    options: dict[str, Any] = field(default_factory=dict)
    fit: str = "crop"
    other_sizes: dict[str, str] = field(default_factory=dict)


COCO, MASKS = str(DATA / "coco200" / "images"), str(DATA / "coco200" / "masks")
CASES: dict[TaskName, Case] = {
    "segmentation": Case(COCO, options={"labels": MASKS, "ignore": (0, 255), "classes": 20}),
    "depth": Case(
        str(DATA / "nyu120" / "images"), options={"labels": str(DATA / "nyu120" / "depth"), "depth_scale": 10 / 255}
    ),
    "keypoints": Case(
        str(DATA / "willow"), options={"labels": str(DATA / "willow" / "keypoints.json")}, fit="pad"
    ),
    "video": Case(
        str(DATA / "davis5" / "images"), "224x384", {"labels": str(DATA / "davis5" / "masks"), "video_rows": 40},
        other_sizes={"vit": "224x392"},
    ),
    "discovery": Case(COCO, options={"labels": MASKS, "objects": tuple(range(1, 91)), "limit": 100}),
    "held_out_views": Case(COCO, options={"limit": 40}),
    "reconstruction": Case(COCO, options={"limit": 40}),
}  # fmt: skip
# An upsampler changes nothing of the other one.
TASKS: tuple[TaskName, ...] = tuple(task for task in CASES if task != "reconstruction")


def side(name: str, case: Case, backbone: str, upsampler: str, components: int = COMPONENTS) -> str:
    """A value of --features: options of the upsampler, and those of the case and the backbone."""
    known = BACKBONES[backbone]
    of_output = case.other_sizes.get(backbone, case.size)
    size = f"size={of_output}"
    if name.endswith("2×"):
        larger = "x".join(str(2 * int(length)) for length in of_output.split("x"))
        size = f"size={larger},output_size={of_output}"
    options = f"components={components},{size},workers=0,device=cpu" + (
        "" if case.fit == "crop" else f",fit={case.fit}"
    )
    return f"name={name},backbone={known['backbone']},weights={known['weights']},{upsampler},{options}"


def evaluated(
    task: TaskName, features: tuple[str, ...], stores: str, limit: int | None
) -> tuple[Result, EvaluateConfig]:
    """Evaluate sides on a task; prints the table."""
    case = CASES[task]
    options = case.options if limit is None else case.options | {"limit": limit}
    with tempfile.TemporaryDirectory() as report:
        config = EvaluateConfig(
            task=task, features=features, images=case.images, stores=stores, report=report, shown=0, **options
        )
        result = evaluate(config)
    print(result.describe(), flush=True)
    return result, config


def main(
    stores: str,
    backbones: tuple[str, ...] = tuple(BACKBONES),
    tasks: tuple[TaskName, ...] = TASKS,
    methods: tuple[str, ...] = tuple(METHODS),
    trainings: Path = Path("trainings"),
    limit: int | None = None,
) -> None:
    """Measure.

    Args:
        stores: folder that keeps the features.
        backbones: names in `BACKBONES`.
        tasks: names in `TASKS`.
        methods: names in `METHODS`; differences are to bilinear.
        trainings: folder of benchmarks.train.training.
        limit: images of each split.
    """
    torch.set_num_threads(1)
    methods = tuple(dict.fromkeys((BASELINE, *methods)))
    for task in tasks:
        for backbone in backbones:
            features = tuple(
                side(
                    method,
                    CASES[task],
                    backbone,
                    METHODS[method].format(trainings=trainings.resolve(), backbone=backbone),
                )
                for method in methods
            )
            result, config = evaluated(task, features, stores, limit)
            for row in rows_of(result, config):
                write("evaluation", {"backbone": backbone, "k": COMPONENTS} | row, result)


def rows_of(result: Result, config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """A row a side: each figure with its interval, and its difference to the first side's; and the side's cost."""
    options = {name: value for name, value in asdict(config).items() if name in ("runs", "pixels", "classes", "limit")}
    for one in result.comparison.sides:
        figures = {
            name: {"value": of_sides[one.name][0].row(), "difference": of_sides[one.name][1].row()}
            for name, of_sides in result.estimates.items()
        }
        row = {"task": result.task, "method": one.name, "units": len(result.outcome.units), "unit": result.outcome.unit}
        row |= {"options": options, "figures": figures}
        yield row | {"seconds_per_image": one.seconds_per_image, "threads": torch.get_num_threads()}


def write(table: str, row: dict[str, Any], result: Result) -> None:
    """Append a row to ``results``, with the evaluation's notes and the machine."""
    rows.append(table, {**row, "notes": result.comparison.notes, **rows.measured_on()})
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
