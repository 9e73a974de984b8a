"""What training minimises, and the error on held-out views."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.train.build import build_stages
from pipeline.train.data import Draw
from pipeline.train.held_out import HeldOutViews, rendered_size
from pipeline.train.loop import autocast
from pipeline.train.objectives.base import LOSS, FeatureStatistics
from pipeline.train.objectives.jbu_views import JBUViewsObjective
from pipeline.train.objectives.lift import LiFTObjective
from pipeline.train.objectives.losses import (
    Uncertainty,
    cosine_distance,
    random_projection,
    sampled_crf,
    uncertain_error,
)
from pipeline.train.plan import make_train_plan
from pipeline.upsamplers import jbu as upsample_jbu
from pipeline.upsamplers.build import Bilinear
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.views.downsample import AttentionDownsampler
from pipeline.views.jitter import apply_matrices
from tests.helpers.rounding import assert_close, term_sizes
from tests.helpers.trainings import HERE, train_config


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone("resnet18", size=(48, 64), weights="random", layer=3)


# --- Losses ---


def test_the_likelihood_is_a_gaussians() -> None:
    predicted, target = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind(0)
    deviation = torch.rand(2, 1, 4, 5, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal(target, deviation.expand_as(target))
    expected = -normal.log_prob(predicted).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(uncertain_error(predicted, target, deviation), expected)


def test_the_crf_of_all_pairs_one_by_one() -> None:
    features, image = torch.randn(2, 5, 6, 9, dtype=torch.float64), torch.randn(2, 3, 6, 9, dtype=torch.float64)
    points = torch.tensor([[0, 0], [5, 8], [2, 3], [2, 4]])
    total = 0.0
    for b in range(2):
        for y0, x0 in points.tolist():
            for y1, x1 in points.tolist():
                place = ((y0 - y1) / 6) ** 2 + ((x0 - x1) / 9) ** 2
                colour = (image[b, :, y0, x0] - image[b, :, y1, x1]).square().sum()
                alike = 10 * torch.exp(-place / torch.tensor(0.2) - colour / 0.3) + 3 * np.exp(-place / 0.01)
                total += float(alike * (features[b, :, y0, x0] - features[b, :, y1, x1]).square().sum())
    assert float(sampled_crf(features, image, points)) == pytest.approx(total / (2 * 16), rel=1e-6)


def test_small_losses() -> None:
    projection = random_projection(2, 10, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(projection.square().sum(1), torch.ones(2, 4))
    features = torch.randn(2, 6, 3, 3)
    assert float(cosine_distance(features, 3 * features)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(features, -features)) == pytest.approx(2)
    assert Uncertainty(6)(1000 * features).min() >= 1e-4


# --- Objectives ---


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_losses_on_few_directions_are_those_on_all_channels(
    photographs: Path, backbone: Backbone, final: bool, downsampler: str
) -> None:
    """Against all C channels, upsampled, viewed, blurred, and only then projected."""
    config = train_config(
        photographs, "unused", final=final, downsampler=downsampler, backbones=("resnet18@3",), crf_weight=0.1
    )
    images = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    objective = JBUViewsObjective(config, [backbone], [FeatureStatistics.of(backbone(images))])
    prepared = objective.prepare(0, images, Draw(0, 0, 0))
    losses = objective(prepared)

    head = objective.heads[0]
    high = objective.upsample(prepared.low, images, rendered_size(backbone)) / head.deviation
    terms = []
    for view in prepared.views:
        seen = apply_matrices(high, view.rows, view.columns)
        if isinstance(head.downsampler, AttentionDownsampler):
            kept = prepared.kept_channels[:, :, None, None] * seen
            saliency = F.conv2d(kept, head.downsampler.saliency.weight[:, :, None, None])
            low = head.downsampler(seen, saliency, view.kept_cells)
        else:
            low = head.downsampler(seen, backbone.grid)
        deviation = head.uncertainty((view.target - head.mean) / head.deviation)
        both = [torch.einsum("bchw,bck->bkhw", m, prepared.projection) for m in (low, view.target / head.deviation)]
        terms.append(uncertain_error(*both, deviation))
    projected = torch.einsum("bchw,bck->bkhw", high, prepared.projection)
    crf = sampled_crf(projected, imagenet_normalised(images), prepared.points)
    torch.testing.assert_close(losses["crf"], crf, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["likelihood"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[LOSS], losses["likelihood"] + 0.1 * losses["crf"])
    losses[LOSS].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert not any(name.startswith("model.") for name in objective.state_dict())


def test_compiled_stages_train_as_their_definition_does(
    photographs: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(photographs, "unused", backbones=("resnet18@3",), jitters=2)
    images = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    objective = JBUViewsObjective(config, [backbone], [FeatureStatistics.of(backbone(images))])
    prepared = objective.prepare(0, images, Draw(0, 0, 0))

    def loss_and_gradients(*parameters: torch.Tensor) -> list[torch.Tensor]:
        for parameter, value in zip(objective.parameters(), parameters, strict=True):
            parameter.data = value
        objective.zero_grad()
        loss = objective(prepared)[LOSS]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)]

    parameters = [parameter.detach().clone() for parameter in objective.parameters()]
    assert objective.upsampler.explain(torch.device("cpu")).startswith("cpu")
    compiled = loss_and_gradients(*parameters)
    monkeypatch.setattr(upsample_jbu, "learned_stage", partial(upsample_jbu.learned_stage, implementation="reference"))
    defined, sizes = loss_and_gradients(*parameters), term_sizes(loss_and_gradients, *parameters)
    for actual, expected, size in zip(compiled, defined, sizes, strict=True):
        assert_close(actual, expected, 1e-5, size)


def test_mixed_precision_is_for_lift_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, *, enabled: enabled and (device, dtype))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    asked = [autocast(device, cast(Any, kind)) for kind in (LiFTObjective, JBUViewsObjective) for device in (cpu, cuda)]
    assert asked == [False, ("cuda", torch.bfloat16), False, False]


# --- Held-out views ---


class _Painter(nn.Module):
    """Stands in for a backbone whose features are the mean colours of 4×4 pixels: as equivariant as can be."""

    label = "painter at layer 7"
    num_chs, reduction, grid = 3, 4, (8, 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images.float(), 4)


def test_the_error_on_held_out_views() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    views = HeldOutViews(images, views=3, max_pad_px=6, max_zoom=2)
    painter = _Painter()
    mean = painter(images).mean((0, 2, 3), keepdim=True)
    errors = views.errors(
        painter,  # type: ignore[arg-type]
        {
            "exact": lambda low, image, size: image.float(),
            "constant": lambda low, image, size: mean.expand(1, 3, *size),
            "bilinear": Bilinear(),
            "flipped": lambda low, image, size: image.float().flip(3),
        },
        HERE,
    )
    assert errors["exact"].relative < 1e-4  # pixels of views are rounded
    assert errors["exact"].cosine > 0.9999
    assert errors["constant"].relative == pytest.approx(1, abs=0.05)  # but for views not being the images
    assert errors["exact"].relative < errors["bilinear"].relative < 1 < errors["flipped"].relative


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "are the same everywhere"), (0.1, "are the same everywhere"), (torch.nan, "NaN")]
)
def test_features_that_nothing_can_be_measured_on(value: float, words: str) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    painter = _Painter()
    painter.forward = lambda images: torch.full((len(images), 3, 8, 12), value)  # type: ignore[method-assign]
    with pytest.raises(JobError, match=f"painter at layer 7: .* {words}.* choose another layer"):
        HeldOutViews(images, views=2, max_pad_px=6, max_zoom=2).errors(painter, {"bilinear": Bilinear()}, HERE)  # type: ignore[arg-type]


def test_features_that_are_not_finite_are_found_before_training(photographs: Path, tmp_path: Path) -> None:
    plan, (backbone,) = make_train_plan(train_config(photographs, tmp_path / "training"))
    with torch.no_grad():
        next(backbone.parameters()).fill_(torch.nan)
    with pytest.raises(JobError, match=r"resnet18 at layer 3: its features .* NaN"):
        build_stages(plan, HERE, 1, [backbone])
