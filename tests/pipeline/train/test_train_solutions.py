"""Training JBU to copy multiview's solutions: where it begins, what it learns, and what it leaves out."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jobs.demo import write_weights
from jobs.train_upsampler import train_upsampler
from kernels.jbu import JBUStack
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.features.checkpoints import read_metadata
from pipeline.train.data import Draw
from pipeline.train.objectives.base import LOSS, FeatureSample
from pipeline.train.objectives.feature_cache import FeatureCache
from pipeline.train.objectives.jbu_initial import begin_as_bilateral
from pipeline.train.objectives.jbu_solutions import JBUSolutionsObjective
from pipeline.train.objectives.solutions import Solutions
from pipeline.upsamplers.jbu import JBU
from tests.helpers.trainings import record, same_tensors, table, train_config, write_photographs

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


def blocks(count: int, side: int = 64) -> Tensor:
    """Images of random colours, 8 px each."""
    small = torch.randint(0, 256, (count, 3, side // 8, side // 8), dtype=torch.uint8)
    return small.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Crops of photographs, 96 px."""
    pictures = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    crops = [picture[y : y + 192, x : x + 192] for picture in pictures for y in (0, 100) for x in (0, 70, 140, 210)]
    whole = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(whole, 2).round().to(torch.uint8)


@pytest.fixture(scope="module")
def objective(photographs: Tensor, tmp_path_factory: pytest.TempPathFactory) -> JBUSolutionsObjective:
    """On features of EfficientNet-Lite0: those of random weights hardly depend on what is where."""
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    write_weights(weights)
    backbone = build_backbone("tf_efficientnet_lite0", size=(96, 96), weights=str(weights), layer=-2)
    config = train_config(Path("unused"), "unused", target="multiview", jitters=5, projection_chs=30)
    sample = FeatureSample(photographs[:24], torch.cat([backbone(one) for one in photographs[:24].split(8)]))
    solutions = Solutions(backbone, sample)
    cache = FeatureCache(len(photographs), solutions.values, 1e9)
    return JBUSolutionsObjective(config, [solutions], [cache], photographs[:24])


@pytest.mark.parametrize("side", [64, 20])
def test_it_begins_at_the_training_free_kernels(side: int) -> None:
    images = F.interpolate(blocks(4).float(), (side, side)).to(torch.uint8)
    stack = JBUStack(None)
    begin_as_bilateral(stack, images)
    other, low, size = blocks(1), torch.randn(1, 5, 4, 4), (64, 64)
    begun, plain, free = (one(low, other, size) for one in (JBU(stack), JBU(JBUStack(None)), JBU()))
    assert (begun - free).square().mean() < 0.03 * free.square().mean()
    assert (plain - free).square().mean() > 0.2 * free.square().mean()


def test_it_learns_what_multiview_solves_for(photographs: Tensor, objective: JBUSolutionsObjective) -> None:
    trained = copy.deepcopy(objective)
    optimizer = trained.optimizer(2e-3)
    for step in range(48):
        batch = photographs[2 * (step % 12) :][:2]
        optimizer.zero_grad()
        trained(trained.prepare(0, batch, Draw(0, step, 0)))[LOSS].backward()
        optimizer.step()
        trained.after_step()
    # On photographs that it was not trained on, with the averaged weights, against where it began.
    (solutions,), unseen, size = trained._solutions, photographs[24:], (96, 96)
    low, solved = solutions.solve(unseen)
    target = solutions.finish(solved, unseen)
    error, begun, free = (
        float((one(low, unseen, size) - target).square().mean()) for one in (trained.trained, objective.trained, JBU())
    )
    assert error < 0.97 * begun
    assert error < 0.97 * free
    assert (trained.trained(torch.ones(1, 1, 6, 6), unseen[:1], size) - 1).abs().mean() < 0.05


def test_images_without_a_solution_are_left_out(
    photographs: Tensor, objective: JBUSolutionsObjective, caplog: pytest.LogCaptureFixture
) -> None:
    grey = torch.full_like(photographs[:1], 128)
    error = objective(objective.prepare(0, photographs[:1], Draw(0, 0, 0)))["error"]
    both = objective(objective.prepare(0, torch.cat([photographs[:1], grey]), Draw(0, 0, 0)))
    torch.testing.assert_close(both["error"], error, rtol=1e-4, atol=1e-5)
    assert "an image is left out of training on tf_efficientnet_lite0" in caplog.text
    alone = objective(objective.prepare(0, grey, Draw(0, 0, 0)))
    objective.zero_grad()
    alone[LOSS].backward()
    assert float(alone["error"].detach()) == 0
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    (solutions,) = copy.deepcopy(objective._solutions)
    solutions._with, solutions._without = 0, 31
    with pytest.raises(JobError, match=r"multiview has no solution for any of \d+ images; the last: "):
        solutions.solve(grey)


@pytest.mark.parametrize("kept", [True, False])
def test_solutions_are_kept_if_they_fit(photographs: Tensor, objective: JBUSolutionsObjective, kept: bool) -> None:
    (solutions,), own = objective._solutions, copy.copy(objective)
    assert solutions.values == sum(tensor.numel() for tensor in solutions.solve(photographs[:1]))
    own._caches = (FeatureCache(10, solutions.values, 4 * 10 * solutions.values - (not kept)),)
    calls = []
    handle = solutions._backbone.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    first = own.prepare(0, photographs[:2], Draw(0, 0, 0))
    solved = len(calls)
    assert torch.equal(own.prepare(0, photographs[:2], Draw(0, 0, 0)).target, first.target)
    assert len(calls) == (solved if kept else 2 * solved)
    handle.remove()


def test_images_of_one_colour_are_refused(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("val", 2)):
        (tmp_path / name).mkdir()
        for shade in range(count):
            Image.new("RGB", (80, 80), (60 * shade, 99, 199)).save(tmp_path / name / f"{name}{shade}.png")
    config = train_config(tmp_path, tmp_path / "out", target="multiview", jitters=5, backbones=("resnet18@2=random",))
    with pytest.raises(JobError, match=r"multiview can use none of the sampled training images: each has one colour"):
        train_upsampler(config)


def test_the_job_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("pipeline.train.objectives.jbu_initial._STEPS", 20)  # each training begins, also a resumed one
    folder = tmp_path / "photographs"
    write_photographs(folder / "train", 6)
    write_photographs(folder / "val", 2, first=6)
    config = train_config(folder, tmp_path / "out", target="multiview", jitters=5, backbones=("resnet18@2=random",))
    assert train_upsampler(config) == 0
    assert set(table(tmp_path / "out", "losses.csv")) == {"step", "backbone", LOSS, "error", "edges", "sums"}
    weights = tmp_path / "out" / "upsampler.safetensors"
    assert read_metadata(str(weights))["final"] == "off"
    assert "solutions for all images take" in caplog.text
    assert caplog.text.count("begins at the training-free kernels") == 1
    assert train_upsampler(replace(config, steps=6, resume=True)) == 0
    assert caplog.text.count("begins at the training-free kernels") == 1
    whole = replace(config, steps=6, output=str(tmp_path / "whole"))
    assert train_upsampler(whole) == 0
    assert record(tmp_path / "out") == record(tmp_path / "whole")
    assert same_tensors(weights, tmp_path / "whole" / "upsampler.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"final": True}, "--final True is for --target views: got multiview"),
        ({"target": "views", "cache_gb": 3.0}, "--cache-gb 3.0 is for --target multiview: got views"),
        ({"jitters": 2}, "--jitters 2 is for --target views: got multiview"),
        ({"upsampler": "lift"}, "--target multiview is for --upsampler jbu: got lift"),
    ],
)
def test_options_of_another_target(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_config(tmp_path, "out", **{"target": "multiview", "jitters": 5, **options})
