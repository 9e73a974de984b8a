"""Claim: one command trains an upsampler for any backbone that predicts unseen views better than interpolation.

    python -m benchmarks.train.training --folder trainings

Trains each recipe on coco200's training half (hours on a CPU; trainings already in --folder are reused), and records
the loss and the error on held-out views of the validation half over steps. The seconds of a step, and the backbone's
share, are measured separately on a few steps.
"""

import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import rows
from benchmarks.upsamplers.held_out import COCO, SHARED
from jobs.train_upsampler import train_upsampler
from pipeline.run.feature_worker import pick_device
from pipeline.train.build import build_stages
from pipeline.train.loop import Training
from pipeline.train.plan import make_train_plan
from pipeline.train.world import World
from schemas.train_options import TrainConfig

_LITE0 = "tf_efficientnet_lite0@{}=" + str(SHARED / "weights" / "tf_efficientnet_lite0.safetensors")
_VIT_TI = "vit_tiny_patch16_224@{}=" + str(SHARED / "weights" / "vit_tiny_patch16_224.safetensors")
_VIT = "vit_small_patch14_dinov2.lvd142m@{}=" + str(SHARED / "weights" / "vit_small_patch14_dinov2.focus.safetensors")

RECIPES: dict[str, dict[str, Any]] = {
    # Also measured on a backbone that it is not trained on.
    "jbu on lite0": {
        "backbones": (_LITE0.format(2), _LITE0.format(3)),
        "held_out_backbone": _VIT.format(10),
        "steps": 300,
        "evaluate_every": 150,
    },
    # To copy what multiview solves for on two backbones; measured on a third.
    "jbu on solutions": {
        "target": "multiview",
        "backbones": (_LITE0.format(3), _VIT_TI.format(11)),
        "held_out_backbone": _VIT.format(10),
        "steps": 800,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "evaluate_every": 200,
    },
    "lift on vit": {"upsampler": "lift", "backbones": (_VIT.format(10),), "steps": 600, "evaluate_every": 100},
    "lift on vit-ti": {"upsampler": "lift", "backbones": (_VIT_TI.format(11),), "steps": 600, "evaluate_every": 100},
    # The main job's default layers, so that benchmarks/evaluate/tasks.py can use the weights.
    "lift on lite0": {"upsampler": "lift", "backbones": (_LITE0.format("3,4"),), "steps": 400, "evaluate_every": 100},
}
_TIMED_STEPS = 6
_POINTS = 30  # approximate number per curve
_STEP = "data", "backbone", "forward", "backward", "optimizer"


def config_of(recipe: str, output: Path, **changes: Any) -> TrainConfig:
    """The options of a recipe's training."""
    options: dict[str, Any] = {"val_count": 24, "checkpoint_every": 50, "resume": True, **RECIPES[recipe], **changes}
    images = {"images": str(COCO / "train"), "val_images": str(COCO / "val")}
    return TrainConfig(output=str(output), **images, **options)


def seconds_of_a_step(recipe: str, device: str) -> dict[str, float]:
    """Mean seconds of warm steps by part; the backbone's include its views and solutions, none of which are kept."""
    with tempfile.TemporaryDirectory() as folder:
        measured = {"steps": 2 * _TIMED_STEPS, "val_count": 1, "val_views": 1, "evaluate_every": 999}
        keeps = RECIPES[recipe].get("upsampler") == "lift" or RECIPES[recipe].get("target") == "multiview"
        uncached = {"cache_gb": 0} if keeps else {}
        config = config_of(recipe, Path(folder), **measured, **uncached)
        plan, backbones = make_train_plan(config)
        world = World(torch.device(device))
        training = Training(plan, build_stages(plan, world, 1, backbones), world)
        marks: list[dict[str, float]] = []
        step = training._step

        def noted(*arguments: Any) -> Any:
            marks.append(dict(training.seconds.total()))
            return step(*arguments)

        training._step = noted  # type: ignore[method-assign]
        training.run()
    before, after = marks[_TIMED_STEPS], marks[-1]
    steps = len(marks) - 1 - _TIMED_STEPS
    return {part: round((after.get(part, 0) - before.get(part, 0)) / steps, 3) for part in _STEP}


def held_out_curves(output: Path) -> list[dict[str, str]]:
    with (output / "held_out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def loss_curve(output: Path) -> list[tuple[int, float]]:
    """Points (step, mean loss since the previous point), over all backbones."""
    with (output / "losses.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    stretch = max(1, len(losses) // _POINTS)
    ends = range(stretch, len(losses) + 1, stretch)
    return [(end, round(statistics.mean(losses[end - stretch : end]), 5)) for end in ends]


def main(folder: Path = Path("trainings"), recipes: tuple[str, ...] = tuple(RECIPES), device: str = "auto") -> None:
    """Measure; append a row per recipe.

    Args:
        folder: folder of trainings, reused if present.
        recipes: names in `RECIPES`.
        device: "auto", "cpu" or "cuda".
    """
    chosen = pick_device(device)
    for recipe in recipes:
        output = folder / recipe.replace(" ", "_")
        if not (output / "upsampler.safetensors").exists() and train_upsampler(config_of(recipe, output)):
            raise SystemExit(f"{recipe}: training failed")
        torch.set_num_threads(1)
        seconds = seconds_of_a_step(recipe, chosen)
        curves = {"losses": loss_curve(output), "held_out": held_out_curves(output)}
        row = {"recipe": recipe, "step_s": seconds, "threads": 1, **curves}
        rows.append("training", {**row, **rows.measured_on()})
        print(json.dumps(row))


if __name__ == "__main__":
    tyro.cli(main)
