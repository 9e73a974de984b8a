"""Claim: training-free JBU makes better features with wider kernels in its first two stages.

    python -m benchmarks.upsamplers.jbu_settings

A linear probe (`benchmarks.upsamplers.probe`) on photographs of coco200's training half: trained on 60 of them,
evaluated on the other 40. The validation half, on which upsamplers are compared, chooses nothing.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.upsamplers import probe
from benchmarks.upsamplers.held_out import BACKBONES, SIZE, build, fitted_basis
from densefeat.torch.bilateral import StageSettings, settings_of, stages_to
from pipeline.evaluate.bootstrap import paired
from pipeline.evaluate.probe import mean_iou, share
from pipeline.upsamplers.bilinear import Bilinear
from pipeline.upsamplers.interface import LinearUpsampler
from pipeline.upsamplers.jbu import JBU, NARROW, WIDE

BASELINE, RUNS, PHOTOS = "bilinear", 5, 100


def stages(*radii: int, sigma_range: float = 0.1, sigma_spatial: float | None = None) -> Sequence[StageSettings]:
    """Settings of stages with these radii; by default, the spatial standard deviation is half of the radius."""
    return [StageSettings(radius, sigma_spatial or radius / 2, sigma_range) for radius in radii]


# Settings by name: the radii of the stages, the last of which holds for the rest.
SETTINGS: dict[str, Sequence[StageSettings]] = {
    "3": NARROW,
    "3, σ_range 0.05": stages(3, sigma_range=0.05),
    "3, σ_range 0.2": stages(3, sigma_range=0.2),
    "3, σ_spatial 1": stages(3, sigma_spatial=1.0),
    "3, σ_spatial 3": stages(3, sigma_spatial=3.0),
    "5": stages(5),
    "7": stages(7),
    "7, then 3": stages(7, 3),
    "3, 3, then 7": stages(3, 3, 7),
    "5, 7, then 3": stages(5, 7, 3),
    "5, 7, σ_range 0.05, then 3": WIDE,
    "7, 7, σ_range 0.05, then 3": [*stages(7, 7, sigma_range=0.05), *NARROW],
    "5, 7, then 3, all σ_range 0.05": stages(5, 7, 3, sigma_range=0.05),
}


def work(settings: Sequence[StageSettings], grid: tuple[int, int] = (14, 14), size: tuple[int, int] = SIZE) -> int:
    """Multiplications of a component by a weight, from a grid to the output's size."""
    total = 0
    for number in range(stages_to(grid, size)):
        pixels = (grid[0] << number + 1) * (grid[1] << number + 1)
        total += pixels * (2 * settings_of(number, settings, (grid[0] << number, grid[1] << number)).radius + 1) ** 2
    return total


def main(backbones: tuple[str, ...] = tuple(BACKBONES), settings: tuple[str, ...] = tuple(SETTINGS)) -> None:
    """Measure; append a row per backbone and settings.

    Args:
        backbones: names in `BACKBONES`.
        settings: names in `SETTINGS`.
    """
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name in backbones:
            measure(name, settings)


def measure(name: str, settings: Sequence[str]) -> None:
    """Evaluate settings with a backbone."""
    device = torch.device("cpu")
    backbone = build(name, device)
    basis = fitted_basis(backbone, device)
    labelled = probe.labelled("train", PHOTOS, device)
    parts = ([photo for i, photo in enumerate(labelled) if (i % 5 < 3) == first] for first in (True, False))
    train, val = probe.with_frequent_classes(*parts)
    low = {id(photo): backbone(photo) for photo, _ in train + val}
    upsamplers: dict[str, LinearUpsampler] = {BASELINE: Bilinear()}
    upsamplers |= {one: JBU(settings=SETTINGS[one]) for one in settings}
    counts, border = {}, {}
    for method, upsampler in upsamplers.items():
        stage = upsampler.with_basis(*basis)
        high = {id(photo): stage(low[id(photo)], photo, SIZE).half() for photo, _ in train + val}
        counts[method], border[method] = probed(high, train, val)
        print(name, method, f"{mean_iou(counts[method].double().sum(1)).mean():.4f}", flush=True)
    figures = {"miou": paired(counts, mean_iou, BASELINE), "border_accuracy": paired(border, share, BASELINE)}
    for method in upsamplers:
        row: dict[str, Any] = {"backbone": name, "settings": method, "train": len(train), "val": len(val), "runs": RUNS}
        for figure, of_methods in figures.items():
            value, difference = of_methods[method]
            row |= {figure: value.row(), f"{figure}_difference": difference.row()}
        rows.append("jbu_settings", {**row, **rows.measured_on()})
        print(json.dumps(row), flush=True)


def probed(high: dict[int, Tensor], train: list[probe.Photo], val: list[probe.Photo]) -> tuple[Tensor, Tensor]:
    """Counts of `probe.evaluated`, of features by the photographs' id."""

    def of(photo: Tensor) -> Tensor:
        return high[id(photo)]

    return probe.evaluated(of, probe.trained(of, train, probe.draws_of(RUNS, len(train))), val)


if __name__ == "__main__":
    tyro.cli(main)
