"""The parts of training around its steps: data, processes, checkpoints, configuration."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from densefeat.errors import StorageUnavailable
from densefeat.storage.objects import Objects
from densefeat.torch.bilateral import resize
from pipeline.errors import JobError
from pipeline.features.checkpoints import read_state_dict
from pipeline.images.listing.source import list_images
from pipeline.train import plan
from pipeline.train.build import build_stages
from pipeline.train.checkpoints import HeldOutRow, LossRow, TrainState, load_newest, save, tables
from pipeline.train.curves import curves
from pipeline.train.data import Draw, ImageTable, TrainingOrder, first_usable, key_hash, training_batches
from pipeline.train.held_out import ViewError
from pipeline.train.loop import Training, train
from pipeline.train.plan import make_train_plan
from pipeline.train.world import World
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.lift.network import LiFT
from schemas.train_options import BackboneChoice, TrainConfig
from tests.helpers.trainings import HERE, train_config, write_photographs

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
    # However many images of a batch have to be replaced.
    large = ImageTable(source.references, source.kind, None).loader(config, 60, 1)
    ((keys, _),) = training_batches(source.references, large, TrainingOrder(5, 60, 1, 0), 0, range(1))
    assert (len(keys), set(keys)) == (60, {"01.png", "02.png", "04.png"})
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(JobError, match="16 images in a row"):
        batches(range(1))


def test_one_image_is_on_one_side_whatever_names_it_has(photographs: Path, tmp_path: Path) -> None:
    """Rows of a list, under several keys or through links."""
    folder = write_photographs(tmp_path / "images", 5)
    (tmp_path / "links").symlink_to(folder)
    lines = ["key,path"]
    for number, path in enumerate(sorted(folder.iterdir())):
        lines += [f"{number}-{i},{(tmp_path / 'links' if i % 2 else folder) / path.name}" for i in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    hashes = np.array(plan._hashes(list_images(str(tmp_path / "list.csv")).references)).reshape(5, 6)
    assert (hashes == hashes[:, :1]).all()
    assert len(set(hashes[:, 0])) == 5
    config = train_config(photographs, tmp_path / "output", images=str(folder), val_images=str(tmp_path / "links"))
    with pytest.raises(JobError, match="5 of them are also in --images"):
        plan.make_train_plan(config)


# --- Several processes ---


class _OtherDisk(World):
    """As if another process had found a checkpoint two steps further."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value + 2] if isinstance(value, int) else [value]


def test_an_output_that_not_all_nodes_share(photographs: Path, tmp_path: Path) -> None:
    plan, built = make_train_plan(train_config(photographs, tmp_path / "training"))
    world = _OtherDisk(torch.device("cpu"))
    with pytest.raises(JobError, match="of the steps 0, 2: --output must be storage that all nodes share"):
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

    runner._with_retries(partial(fit, 2), 2, OSError)
    assert len(starts) == 3
    starts.clear()
    with pytest.raises(JobError, match=r"workers died 3 times.*a node is gone.*--resume continues"):
        runner._with_retries(partial(fit, 9), 2, OSError)
    assert len(starts) == 3


# --- State ---


def state_at(step: int) -> TrainState:
    rows = [LossRow(i + 1, "resnet18@3", {"loss": 1 / (i + 1), "crf": 0.1 + i}) for i in range(step)]
    errors = {"jbu": ViewError(1 / 3, 0.5), "bilinear": ViewError(0.4, 0.6)}
    held_out = [HeldOutRow(0, "resnet18@3", True, errors), HeldOutRow(step, "vit@1", False, errors)]
    return TrainState(step, {"weight": torch.full((2,), float(step))}, {"state": {0: {"step": 1}}}, rows, held_out)


def test_checkpoints_come_back_and_old_ones_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    for error in (StorageUnavailable("no answer"), PermissionError(13, "no"), MemoryError()):  # not damage
        with monkeypatch.context() as failing:
            failing.setattr(Objects, "get", Mock(side_effect=error))
            with pytest.raises(type(error)):
                load_newest(objects)
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
    assert BackboneChoice.parse("--backbones", name) == BackboneChoice(name, None, "pretrained")
    assert BackboneChoice.parse("", f"{name}@10") == BackboneChoice(name, (10,), "pretrained")
    assert BackboneChoice.parse("", f"{name}@8,-1") == BackboneChoice(name, (8, -1), "pretrained")
    assert BackboneChoice.parse("", f"{name}@-2=s3://b/x=1/v@2.pth") == BackboneChoice(
        name, (-2,), "s3://b/x=1/v@2.pth"
    )
    assert BackboneChoice.parse("", f"{name}=random") == BackboneChoice(name, None, "random")
    for text in ("", "@3", f"{name}@", f"{name}@ten", f"{name}@1,", f"{name}="):
        with pytest.raises(ValueError, match="--backbones is NAME"):
            BackboneChoice.parse("--backbones", text)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2**63}, "--seed must be at least 0 and less than"),
        ({"steps": 0}, "--steps must be at least 1: got 0"),
        ({"val_share": 1.0, "val_images": None}, "--val-share is a share: got 1.0"),
        ({"val_share": 0.1, "val_images": "v"}, "--val-share 0.1 reserves a share of --images, but --val-images v are"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"initial_sigma": -1.0}, "--initial-sigma must be 0.01 … 100 kernel radii: got -1.0"),
        ({"initial_sigma": 1e-300}, "--initial-sigma must be 0.01 … 100"),
        ({"initial_sigma": float("nan")}, "--initial-sigma must be 0.01 … 100"),
        ({"max_pad_px": 64}, "--max-pad-px 64 .* at most 63"),
        ({"max_zoom": 0.5}, "--max-zoom must be at least 1"),
        ({"max_zoom": 1e300}, "--max-zoom .* leaves less than a pixel of an image of --size 64: use at most 64"),
        ({"max_zoom": float("nan")}, "--max-zoom must be a finite number: got nan"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive and finite: got nan"),
        ({"size": "9x"}, "--size"),
        ({"backbones": ()}, "--backbones: got none"),
        ({"backbones": ("resnet18", "resnet18")}, "names a backbone and layer twice"),
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
