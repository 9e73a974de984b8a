"""Claim: 64 components are enough: what other numbers gain or lose on tasks, and what PCA keeps of the channels.

    python -m benchmarks.evaluate.components --stores FOLDER

One store of each backbone and data with many components, upsampled by the default method; sides use the first ones.
Differences are to 64. The task "reconstruction" gives the cosine of the backbone's channels before and after PCA.
"""

import torch
import tyro

from benchmarks.evaluate.tasks import CASES, METHODS, evaluated, rows_of, side, write
from benchmarks.upsamplers.held_out import BACKBONES
from schemas.evaluate_options import TaskName

MOST = {"lite0": 256, "vit-ti": 128, "vit": 256}  # the ViT-Ti/16 has 191 independent channels
COUNTS = (64, 8, 16, 32, 128)  # the default is the baseline
TASKS: tuple[TaskName, ...] = ("segmentation", "depth", "keypoints", "reconstruction")


def main(stores: str, backbones: tuple[str, ...] = tuple(BACKBONES), tasks: tuple[TaskName, ...] = TASKS) -> None:
    """Measure.

    Args:
        stores: folder that keeps the features.
        backbones: names in `BACKBONES`.
        tasks: names of tasks.
    """
    torch.set_num_threads(1)
    for task in tasks:
        for backbone in backbones:
            most = MOST[backbone]
            counts = (most,) if task == "reconstruction" else tuple(dict.fromkeys((*COUNTS, most)))
            features = tuple(side(str(count), CASES[task], backbone, _first(count), most) for count in counts)
            result, config = evaluated(task, features, stores, None)
            for row in rows_of(result, config):
                write("components", {"backbone": backbone, "k": int(row.pop("method"))} | row, result)


def _first(count: int) -> str:
    return f"{METHODS['jbu']},first={count}"


if __name__ == "__main__":
    tyro.cli(main)
