"""Training LiFT: what it begins as, what it minimises, what it keeps."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from pipeline.features.backbone import build_backbone
from pipeline.train.data import Draw
from pipeline.train.objectives.base import LOSS, FeatureSample
from pipeline.train.objectives.feature_cache import FeatureCache
from pipeline.train.objectives.lift import AT_SIZE, LiFTObjective, lift_scales
from pipeline.train.objectives.lift_initial import begin_as_interpolation
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.lift.network import LiFT
from tests.helpers.trainings import train_config


def lift_objective(size: tuple[int, int], max_bytes: float = 1e9, **options: Any) -> LiFTObjective:
    """Of a small network, on images of twice ``size``."""
    config = train_config(Path("photographs"), "nowhere", upsampler="lift", **options)
    backbones = [
        build_backbone("resnet18", size=(round(size[0] * s), round(size[1] * s)), weights="random", layer=2)
        for s in lift_scales(config.lift_octaves)
    ]
    images = blocks(8, size)
    sample = FeatureSample(images, backbones[AT_SIZE](images))
    return LiFTObjective(
        config,
        backbones,
        sample,
        FeatureCache(2, sum(one.num_chs * one.grid[0] * one.grid[1] for one in backbones), max_bytes),
    )


def blocks(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Images of random colours, 8 px each."""
    small = torch.randint(0, 256, (count, 3, size[0] // 8, size[1] // 8), dtype=torch.uint8)
    return small.repeat_interleave(8, 2).repeat_interleave(8, 3)


PUBLISHED = {"lift_loss": "cosine", "lift_initial": "random", "lift_octaves": 2, "lift_consistency": 0.0}


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
def test_lift_learns_directions_and_lengths(options: dict[str, Any]) -> None:
    objective = lift_objective((64, 32), **options)
    optimizer = objective.optimizer(3e-3)
    images = blocks(2, (128, 64))
    losses = []
    for step in range(40):
        parts = objective(objective.prepare(0, images, Draw(0, step, 0)))
        optimizer.zero_grad()
        parts[LOSS].backward()
        optimizer.step()
        objective.after_step()
        losses.append(float(parts[LOSS].detach()))
    assert losses[-1] < 0.5 * losses[0]
    octave = objective.prepare(0, images, Draw(0, 0, 0))[0]
    small = F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    with torch.no_grad():
        high = objective.upsample(octave.low, small, (16, 8))
    assert high.shape == octave.target.shape
    assert 0.5 < float(high.norm() / octave.target.norm()) < 1.5
    # The weights that are published do by themselves what was measured.
    loaded = LiFT.from_state(objective.weights(), patch=int(objective.metadata()["patch"]), num_chs=128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(octave.low, imagenet_normalised(small)), high, rtol=1e-4, atol=1e-5)


def test_lift_is_trained_to_be_what_it_was_made_from() -> None:
    objective = lift_objective((64, 32), lift_octaves=2, lift_consistency=2.0)
    (parts, octaves) = (objective(prepared := objective.prepare(0, blocks(2, (128, 64)), Draw(0, 0, 0))), prepared)
    predicted = [objective.lift(octave.low, octave.image) for octave in octaves]
    variance = objective._variance
    coarse = [(F.avg_pool2d(p, 2) - o.low).square().mean() / variance for p, o in zip(predicted, octaves, strict=True)]
    fine = [(p - o.target).square().mean() / variance for p, o in zip(predicted, octaves, strict=True)]
    torch.testing.assert_close(parts["consistency"], sum(coarse), rtol=1e-4, atol=0)
    torch.testing.assert_close(parts[LOSS], sum(fine) + 2 * sum(coarse), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("num_chs", "rank"), [(32, 12), (8, 8)])
def test_lift_begins_as_interpolation(num_chs: int, rank: int) -> None:
    """Of as much as its layers are wide enough for."""
    mixing = torch.linalg.qr(torch.randn(num_chs, num_chs))[0][:rank]
    features = torch.einsum("bchw,cn->bnhw", F.avg_pool2d(torch.randn(16, rank, 14, 14), 3, 1), mixing) + 4
    image = torch.randn(16, 3, 96, 96)
    lift = LiFT(num_chs, patch=8).train()
    begin_as_interpolation(lift, features, image)
    assert lift.training
    wanted = F.interpolate(features, scale_factor=2.0, mode="bilinear")
    with torch.no_grad():
        made = lift.eval()(features, image)
    inside = (made - wanted)[:, :, 2:-2, 2:-2].square().sum() / (wanted - wanted.mean((0, 2, 3), True)).square().sum()
    # Four of eight equally strong components are lost; of twelve, none, but for what the ReLUs cut off.
    assert inside < 0.02 if rank <= num_chs // 2 else 0.3 < inside < 0.6


def test_lift_keeps_the_average_over_steps() -> None:
    objective = lift_objective((64, 32))
    for value in (1.0, 3.0):  # the newest counts for 9/10 at first, for 1/50 later
        objective.lift.outc.bias.data.fill_(value)
        objective.after_step()
    torch.testing.assert_close(objective.weights()["outc.bias"], torch.full((128,), 1 + 0.9 * (3 - 1)))


def test_features_that_all_fit_are_made_once() -> None:
    backbone = build_backbone("resnet18", size=(64, 32), weights="random", layer=2)
    images = torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8)
    takes = 3 * backbone.num_chs * 8 * 4 * 4
    for max_bytes, times in ((takes, 2), (takes - 1, 4)):
        cache, make = FeatureCache(3, takes // 12, max_bytes), Mock(side_effect=lambda batch: [backbone(batch)])
        assert (cache.bytes, cache.keeps) == (takes, times == 2)
        # The second batch has a new image; the last two, none.
        for rows in ([0, 1], [1, 2], [2, 0], [1, 1]):
            (features,) = cache.features(images[rows], partial(make, images[rows]))
            assert torch.equal(features, backbone(images[rows]))
        assert make.call_count == times


def test_mixed_precision_leaves_losses_and_gradients_float32() -> None:
    """What a GPU does, as well as a CPU can."""
    objective = lift_objective((64, 64), max_bytes=0)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    prepared = objective.prepare(0, images, Draw(0, 0, 0))
    expected = objective(prepared)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(prepared)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    torch.autograd.backward(losses[LOSS])
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in objective.lift.parameters())
    assert objective.predicted_squared.dtype == torch.float32


def test_a_scale_never_turns_features_round() -> None:
    objective = lift_objective((64, 64), lift_loss="cosine")
    objective.predicted_squared.fill_(2.0)
    for projection, scale in ((-1.0, 1), (0.0, 1), (1.0, 0.5)):
        objective.predicted_on_target.fill_(projection)
        before = objective.lift.state_dict()["outc.bias"]
        torch.testing.assert_close(objective.weights()["outc.bias"], scale * before)
