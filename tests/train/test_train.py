"""The parts of training, one by one."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.checkpoints import read_state_dict
from pipeline.images.listing.source import list_images
from pipeline.train.build import build_stages
from pipeline.train.checkpoints import HeldOutRow, LossRow, TrainState, load_newest, save, tables
from pipeline.train.curves import curves
from pipeline.train.data import Draw, ImageTable, TrainingOrder, first_usable, key_hash, training_batches
from pipeline.train.held_out import HeldOutViews, ViewError, rendered_size
from pipeline.train.loop import Training, autocast, train
from pipeline.train.objectives.base import LOSS, FeatureStatistics
from pipeline.train.objectives.jbu import JBUTraining
from pipeline.train.objectives.lift import LiFTTraining
from pipeline.train.objectives.losses import (
    Uncertainty,
    cosine_distance,
    random_projection,
    sampled_crf,
    uncertain_error,
)
from pipeline.train.plan import make_train_plan
from pipeline.train.world import World
from pipeline.upsamplers import jbu as upsample_jbu
from pipeline.upsamplers.build import Bilinear
from pipeline.upsamplers.images import imagenet_normalised, resize
from pipeline.upsamplers.lift.network import LiFT
from pipeline.views.downsample import AttentionDownsampler
from pipeline.views.jitter import apply_matrices
from schemas.train_options import BackboneChoice, TrainConfig
from tests.helpers.rounding import assert_close, term_sizes
from tests.helpers.trainings import train_config, write_photographs

HERE = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder / "train", 6)
    write_photographs(folder / "val", 2, first=6)
    return folder


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


# --- Data ---


def test_an_epoch_is_every_image_once_whoever_takes_it() -> None:
    order = TrainingOrder(rows=12, batch_size=2, workers=3, seed=1)
    for epoch in range(3):
        steps = range(2 * epoch, 2 * epoch + 2)
        assert sorted(row for step in steps for rank in range(3) for row in order.batch(step, rank)) == list(range(12))
    assert order.batch(5, 1) == TrainingOrder(12, 2, 3, 1).batch(5, 1)  # without the steps before
    assert [order.batch(step, 0) for step in range(6)] != [TrainingOrder(12, 2, 3, 2).batch(s, 0) for s in range(6)]


def test_random_numbers_follow_from_seed_step_and_rank() -> None:
    def numbers(*place: int) -> tuple[float, float]:
        draw = Draw(*place)
        return float(draw.numpy.random()), float(torch.rand((), generator=draw.torch))

    assert numbers(0, 7, 1) == numbers(0, 7, 1)
    assert len({numbers(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}) == 27


def test_the_split_by_hash_is_always_the_same() -> None:
    hashes = [key_hash(f"{i}.jpg") for i in range(1000)]
    assert 60 < sum(number < 0.1 for number in hashes) < 140
    assert key_hash("chelsea.png") == pytest.approx(0.488152603873246)


def test_images_that_cannot_be_used_are_replaced(photographs: Path, tmp_path: Path, caplog) -> None:
    folder = write_photographs(tmp_path / "images", 5)
    (folder / "00.png").write_bytes(b"")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:-500])
    config = train_config(photographs, tmp_path / "output")
    source = list_images(str(folder))
    loader = ImageTable(source.references, source.kind, None).loader(config, 2, 1)

    def batches(steps: range) -> list[tuple[list[str], torch.Tensor]]:
        return list(training_batches(source.references, loader, TrainingOrder(5, 2, 1, 0), 0, steps))

    taken = batches(range(10))
    assert {key for keys, _ in taken for key in keys} == {"01.png", "02.png", "04.png"}
    for (keys, pixels), (other_keys, other_pixels) in zip(taken[7:], batches(range(7, 10)), strict=True):
        assert keys == other_keys
        assert torch.equal(pixels, other_pixels)
    assert caplog.text.count("00.png cannot be used") == 2  # once a run
    assert len(first_usable(source.references, loader, 3)[0]) == 3
    with pytest.raises(JobError, match=r"3 of 5 images can be used, expected --val-count 4; 03\.png cannot"):
        first_usable(source.references, loader, 4)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(JobError, match="16 images in a row"):
        batches(range(1))


# --- Trainees ---


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
    trainee = JBUTraining(config, [backbone], [FeatureStatistics.of(backbone(images))])
    prepared = trainee.prepare(0, images, Draw(0, 0, 0))
    losses = trainee(prepared)

    head = trainee.heads[0]
    high = trainee.upsample(prepared.low, images, rendered_size(backbone)) / head.deviation
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
    assert all(parameter.grad is not None for parameter in trainee.parameters())
    assert not any(name.startswith("model.") for name in trainee.state_dict())


def test_compiled_stages_train_as_their_definition_does(
    photographs: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(photographs, "unused", backbones=("resnet18@3",), jitters=2)
    images = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    trainee = JBUTraining(config, [backbone], [FeatureStatistics.of(backbone(images))])
    prepared = trainee.prepare(0, images, Draw(0, 0, 0))

    def loss_and_gradients(*parameters: torch.Tensor) -> list[torch.Tensor]:
        for parameter, value in zip(trainee.parameters(), parameters, strict=True):
            parameter.data = value
        trainee.zero_grad()
        loss = trainee(prepared)[LOSS]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in trainee.parameters() if p.grad is not None)]

    parameters = [parameter.detach().clone() for parameter in trainee.parameters()]
    assert trainee.upsampler.explain(torch.device("cpu")).startswith("cpu")
    compiled = loss_and_gradients(*parameters)
    monkeypatch.setattr(upsample_jbu, "learned_stage", partial(upsample_jbu.learned_stage, implementation="reference"))
    defined, sizes = loss_and_gradients(*parameters), term_sizes(loss_and_gradients, *parameters)
    for actual, expected, size in zip(compiled, defined, sizes, strict=True):
        assert_close(actual, expected, 1e-5, size)


def test_mixed_precision_is_for_lift_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, *, enabled: enabled and (device, dtype))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    asked = [autocast(device, cast(Any, kind)) for kind in (LiFTTraining, JBUTraining) for device in (cpu, cuda)]
    assert asked == [False, ("cuda", torch.bfloat16), False, False]


# --- Held-out views ---


class _Painter(nn.Module):
    """Stands in for a backbone whose features are the mean colours of 4×4 pixels: as equivariant as can be."""

    name, layer = "painter", 7
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


# --- Several processes ---


class _OtherDisk(World):
    """As if another process had found a checkpoint two steps further."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value + 2] if isinstance(value, int) else [value]


def test_an_output_that_not_all_nodes_share(photographs: Path, tmp_path: Path) -> None:
    plan, built = make_train_plan(train_config(photographs, tmp_path / "training"))
    world = _OtherDisk(torch.device("cpu"))
    with pytest.raises(JobError, match="of the steps 0, 2: --output must be a place that all nodes share"):
        Training(plan, build_stages(plan, world, 1, built), world)


def train_as_one_of_two(rank: int, config: TrainConfig, rendezvous: str) -> None:
    """What each of two processes runs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    plan, built = make_train_plan(config)
    train(plan, World(torch.device("cpu"), rank, 2), threads=1, built=built)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_two_processes_measure_is_what_they_save(photographs: Path, tmp_path: Path) -> None:
    """BatchNorm's statistics are each process's own: only one's are saved."""
    config = train_config(
        photographs, tmp_path / "training", upsampler="lift", backbones=("resnet18@2=random",), steps=1
    )
    torch.multiprocessing.spawn(train_as_one_of_two, (config, str(tmp_path / "rendezvous")), 2)  # type: ignore[no-untyped-call]
    plan, (backbone,) = make_train_plan(replace(config, resume=True, output=str(tmp_path / "other")))
    lift = LiFT.from_state(read_state_dict(str(tmp_path / "training" / "upsampler.safetensors")), patch=8, num_chs=128)
    views = build_stages(plan, HERE, 1, [backbone]).views

    def upsample(features: torch.Tensor, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return resize(lift(features, imagenet_normalised(images)), size)

    error = views.errors(backbone, {"lift": upsample}, HERE)["lift"]
    last = load_newest(Objects(config.output)).held_out[-1].errors["lift"]
    assert (last.relative, last.cosine) == pytest.approx((error.relative, error.cosine), rel=1e-4)


def test_workers_that_die_are_started_again() -> None:
    runner = pytest.importorskip("pipeline.train.ray_train")
    starts: list[int] = []

    def fit(deaths: int) -> None:
        starts.append(1)
        if len(starts) <= deaths:
            raise OSError("a node is gone")

    runner._persistently(partial(fit, 2), 2, OSError)
    assert len(starts) == 3
    starts.clear()
    with pytest.raises(JobError, match=r"workers died 3 times.*a node is gone.*--resume goes on"):
        runner._persistently(partial(fit, 9), 2, OSError)
    assert len(starts) == 3


# --- State ---


def state_at(step: int) -> TrainState:
    rows = [LossRow(i + 1, "resnet18@3", {"loss": 1 / (i + 1), "crf": 0.1 + i}) for i in range(step)]
    errors = {"jbu": ViewError(1 / 3, 0.5), "bilinear": ViewError(0.4, 0.6)}
    held_out = [HeldOutRow(0, "resnet18@3", True, errors), HeldOutRow(step, "vit@1", False, errors)]
    return TrainState(step, {"weight": torch.full((2,), float(step))}, {"state": {0: {"step": 1}}}, rows, held_out)


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = Objects(str(tmp_path))
    assert load_newest(objects).step == 0
    for step in (2, 4, 6):
        save(state_at(step), objects)
    loaded, expected = load_newest(objects), state_at(6)
    assert torch.equal(loaded.model.pop("weight"), expected.model.pop("weight"))
    assert loaded == expected
    assert tables(loaded) == tables(expected)
    assert sorted(objects.list("checkpoints")) == [f"checkpoints/step_{n:08}.pt" for n in (4, 6)]
    newest = tmp_path / "checkpoints" / "step_00000006.pt"
    whole, weight = newest.read_bytes(), torch.full((2,), 6.0).numpy().tobytes()
    assert whole.count(weight) == 1
    for damaged in (whole[:-100], whole.replace(weight, weight[:-1] + b"\x00")):
        newest.write_bytes(damaged)
        caplog.clear()
        assert load_newest(objects).step == 4
        assert "step_00000006.pt is damaged: BadZipFile" in caplog.text
    (tmp_path / "checkpoints" / "step_00000004.pt").write_bytes(b"")
    with pytest.raises(JobError, match="all checkpoints"):
        load_newest(objects)


def test_tables_and_curves() -> None:
    losses, held_out = tables(state_at(3)).values()
    assert losses.splitlines()[:2] == ["step,backbone,loss,crf", "1,resnet18@3,1,0.1"]
    assert held_out.splitlines()[-1] == "3,vit@1,0,0.333333333,0.5,0.4,0.6"
    for step in (0, 1, 3, 1000):
        assert curves(state_at(step)).startswith(b"\x89PNG")
    diverging = TrainState(1, losses=[LossRow(1, "resnet18@3", {"loss": 1e18})])
    assert curves(diverging).startswith(b"\x89PNG")


# --- Configuration ---


def test_a_backbone_on_the_command_line() -> None:
    name = "vit_small_patch14_dinov2.lvd142m"
    assert BackboneChoice.parse("--backbones", name) == BackboneChoice(name, -1, "pretrained")
    assert BackboneChoice.parse("", f"{name}@10") == BackboneChoice(name, 10, "pretrained")
    assert BackboneChoice.parse("", f"{name}@-2=s3://b/x=1/v@2.pth") == BackboneChoice(name, -2, "s3://b/x=1/v@2.pth")
    assert BackboneChoice.parse("", f"{name}=random") == BackboneChoice(name, -1, "random")
    for text in ("", "@3", f"{name}@", f"{name}@ten", f"{name}="):
        with pytest.raises(ValueError, match="--backbones is NAME"):
            BackboneChoice.parse("--backbones", text)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2**63}, "--seed must be less than"),
        ({"steps": 0}, "--steps must be at least 1: got 0"),
        ({"val_share": 1.0}, "--val-share"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"initial_sigma": -1.0}, "--initial-sigma must be positive"),
        ({"max_pad_px": 64}, "--max-pad-px 64 .* at most 63"),
        ({"max_zoom": 0.5}, "--max-zoom must be at least 1"),
        ({"max_zoom": float("nan")}, "--max-zoom must be a finite number: got nan"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive and finite: got nan"),
        ({"size": "9x"}, "--size"),
        ({"backbones": ()}, "--backbones: got none"),
        ({"backbones": ("resnet18", "resnet18")}, "--backbones: got one twice"),
        ({"backbones": ("resnet18", "resnet34"), "final": True}, "several --backbones: --final mixes channels"),
        ({"backbones": ("resnet18", "resnet34"), "upsampler": "lift"}, "several --backbones: lift mixes channels"),
        ({"held_out_backbone": "resnet34", "upsampler": "lift"}, "--held-out-backbone: lift"),
        ({"final": True, "upsampler": "lift"}, "--final True is for --upsampler jbu: got lift"),
        ({"projection_chs": 7, "upsampler": "lift"}, "--projection-chs 7 is for --upsampler jbu: got lift"),
        ({"featup_checkpoint": "x.pth", "upsampler": "lift"}, "--featup-checkpoint x.pth is for --upsampler jbu"),
        ({"lift_loss": "cosine"}, "--lift-loss cosine is for --upsampler lift: got jbu"),
        ({"size": "65", "max_pad_px": 8, "upsampler": "lift", "lift_octaves": 2}, "--size 65: lift"),
        ({"featup_checkpoint": "x.npz"}, "--featup-checkpoint is a .pth"),
        ({"featup_checkpoint": "x.pth", "backbones": ("resnet18", "resnet34")}, "--featup-checkpoint: FeatUp's"),
    ],
)
def test_what_a_configuration_refuses(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**{"images": "photos", "output": "out", "size": "64", "max_pad_px": 8, **changed})


def test_a_configuration_is_the_same_in_json(photographs: Path, tmp_path: Path) -> None:
    plan, _ = make_train_plan(train_config(photographs, tmp_path / "output", dry_run=True))
    assert json.loads(json.dumps(plan.configuration)) == plan.configuration
    assert isinstance(plan.train.references, pa.Table)
    assert not (tmp_path / "output").exists()
