"""The training job when something goes wrong: before its first step, or amid it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train_upsampler import train_upsampler
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from pipeline.train.objectives import jbu_views as jbu_training
from pipeline.train.output import claimed_output
from pipeline.train.plan import make_train_plan
from schemas.options import UpsampleConfig
from tests.helpers.trainings import (
    ROOT,
    arguments,
    newest_step,
    options,
    resnet18,
    start,
    table,
    train_config,
    write_photographs,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_backbones_that_results_could_not_tell_apart(photographs: Path, tmp_path: Path) -> None:
    torch.save(resnet18(3).model.state_dict(), tmp_path / "other.pth")
    for changed, words in [
        ({"backbones": ("resnet18@3=random", "resnet18@-2=random")}, ("resnet18@-2=random", "--backbones resnet18@3")),
        ({"held_out_backbone": f"resnet18@3={tmp_path}/other.pth"}, ("--held-out-backbone", "--backbones resnet18@3")),
        ({"held_out_backbone": "resnet18@3=random"}, ("--held-out-backbone", "--backbones resnet18@3")),
    ]:
        with pytest.raises(JobError, match="are both resnet18@3") as caught:
            train_upsampler(replace(train_config(photographs, tmp_path / "training"), **changed))
        assert all(word in str(caught.value) for word in words)


def test_a_loss_that_is_not_finite_stops_it(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spoiled(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(*tensors) * (torch.nan if len(calls) > 6 else 1)  # two views a step: in the fourth

    calls: list[int] = []
    original = jbu_training.uncertain_error
    monkeypatch.setattr(jbu_training, "uncertain_error", spoiled)
    config = train_config(photographs, tmp_path / "training")
    assert train_upsampler(config) == 1
    assert "step 4: the loss is nan" in caplog.text
    assert "The checkpoint of step 2" in caplog.text
    keys = {path.name for path in (photographs / "train").iterdir()}
    assert sum(key in caplog.text.partition("Its batch:")[2] for key in keys) == 2
    assert not (tmp_path / "training" / "upsampler.safetensors").exists()
    assert table(tmp_path / "training", "losses.csv")["step"] == [1, 2, 3]  # one beyond the checkpoint
    assert (tmp_path / "training" / "curves.png").exists()
    monkeypatch.undo()
    assert train_upsampler(replace(config, resume=True)) == 0


def test_weights_that_overflow_stop_it(photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train_upsampler(train_config(photographs, tmp_path / "training", learning_rate=1e38)) == 1
    assert "There is no checkpoint yet" in caplog.text
    assert "a lower --learning-rate or --crf-weight in another --output" in caplog.text
    assert newest_step(tmp_path / "training") == 0
    # Its record stays until somebody has seen it.
    with pytest.raises(JobError, match=r"holds curves.png and losses.csv and held_out.csv"):
        train_upsampler(train_config(photographs, tmp_path / "training", steps=1))


def test_what_cannot_begin_leaves_the_place_to_others(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs / "val", tmp_path / "val")
    next((tmp_path / "val").iterdir()).write_bytes(b"no picture")
    count = len(list((tmp_path / "val").iterdir()))
    asked = train_config(photographs, tmp_path / "training", val_images=str(tmp_path / "val"), steps=1)
    with pytest.raises(JobError, match=rf"{count - 1} of {count} images can be used.*lower --val-count"):
        train_upsampler(replace(asked, val_count=count))
    assert train_upsampler(replace(asked, val_count=count - 1)) == 0


def test_lift_needs_enough_to_begin_as_interpolation(photographs: Path, tmp_path: Path) -> None:
    asked = train_config(photographs, tmp_path / "training", upsampler="lift", limit=1, steps=1)
    words = r"needs at least 256 positions .* got 1 images of 4×4\. Give more .* --lift-initial random"
    with pytest.raises(JobError, match=words):
        train_upsampler(asked)
    assert train_upsampler(replace(asked, lift_initial="random")) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": "/nothing/here"}, "/nothing/here"),
        ({"val_images": None, "val_share": 1e-9}, "held-out views: got 0 images, expected --val-count 2"),
        ({"val_count": 4}, "held-out views: got 3 images, expected --val-count 4"),
        ({"val_images": "{images}"}, "6 of them are also in --images"),
        ({"val_images": None, "val_share": 0.999999, "val_count": 1}, "no image is left to train on"),
        ({"backbones": ("resnet81",)}, "resnet18"),
        ({"backbones": ("resnet18@9",)}, "layer 9"),
        ({"backbones": ("resnet18@4=random",), "size": "32"}, "a grid of 1×1 at --size 32"),
        ({"held_out_backbone": "resnet18@4=random", "size": "32"}, "a grid of 1×1 at --size 32"),
        ({"upsampler": "lift", "size": "72"}, "expected multiples of 16"),
        ({"upsampler": "lift", "size": "80", "lift_octaves": 2}, "expected multiples of 32"),
        ({"output": "/proc/training"}, "--output /proc/training"),
        ({"output": __file__}, "cannot be written: a file has that name, or that of a folder above"),
        ({"output": "/tmp/" + "n" * 300}, "a name is too long for this file system"),
        ({"featup_checkpoint": "/tmp/" + "n" * 250 + ".pth"}, "a name is too long for this file system"),
        ({"featup_checkpoint": "{folder}/jbu.pth"}, "jbu.pth is a folder: expected the name of a file"),
        ({"featup_checkpoint": "/proc/here/jbu.pth"}, "--featup-checkpoint /proc/here/jbu.pth"),
        ({"output": "{images}"}, "overlap: use a separate folder for --output"),
        ({"device": "cuda"}, "CUDA"),
    ],
)
def test_what_is_refused_before_work(photographs: Path, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    if "device" in changed and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if changed.get("val_images"):
        changed = {"val_images": str(photographs / "train")}
    (tmp_path / "jbu.pth").mkdir()
    asked = {
        name: str(value).format(folder=tmp_path) if "checkpoint" in name else value for name, value in changed.items()
    }
    output = asked.pop("output", str(tmp_path / "training")).format(images=photographs / "train" / "training")
    with pytest.raises(JobError) as caught:
        train_upsampler(train_config(photographs, output, **asked))
    assert words in str(caught.value)
    assert not (tmp_path / "training").exists()


def test_files_that_a_training_would_replace(photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "training"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "losses.csv").write_text("mine")
    (output / "curves.png").write_text("mine")
    with pytest.raises(JobError, match=r"holds curves.png and losses.csv, but no training.json: .* Choose another"):
        train_upsampler(train_config(photographs, output))
    assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(
        ("notes.txt", "losses.csv", "curves.png"), "mine"
    )


def test_a_feature_store_is_no_output(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert upsample(UpsampleConfig(
        images=str(photographs / "val"), store=str(store), backbone="resnet18", weights="random", layer="3", size="64",
        components=4, device="cpu", workers=0,
    )) == 0  # fmt: skip
    before = sorted(store.rglob("*"))
    with pytest.raises(JobError, match=r"store is a feature store: choose another --output"):
        train_upsampler(train_config(photographs, store))
    assert sorted(store.rglob("*")) == before


def test_curves_among_the_images_of_a_pattern(photographs: Path) -> None:
    images = photographs / "train"
    with pytest.raises(JobError, match=r"the images .*/train/\*\.png would include --output"):
        train_upsampler(replace(train_config(photographs, images), images=f"{images}/*.png"))
    assert not (images / "training.json").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_a_training_that_another_job_is_at(photographs: Path, tmp_path: Path, begun: bool) -> None:
    config = train_config(photographs, tmp_path / "training", steps=2)
    if begun:
        assert train_upsampler(replace(config, steps=1)) == 0
    plan, _ = make_train_plan(replace(config, resume=begun))
    with (
        claimed_output(config.output, plan.configuration, begun=begun),
        pytest.raises(JobError, match=r"another job is at work on .*/training: all of it, in process \d+"),
    ):
        train_upsampler(replace(config, resume=True))
    assert train_upsampler(replace(config, resume=begun)) == 0
    assert not (tmp_path / "training" / "_jobs").exists()


@pytest.mark.slow
def test_what_a_worker_cannot_do_is_said_once(photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="Ray Train needs the extra train")
    spoiled = tmp_path / "images"
    write_photographs(spoiled, 3)
    for path in spoiled.iterdir():
        path.write_bytes(b"")
    asked = options(photographs, tmp_path / "training", workers=2, images=str(spoiled))
    job = start(asked)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 2, said
    assert "none of the sampled images is usable" in said
    assert "Traceback" not in said
    environment = {**os.environ, "RAY_ADDRESS": ""}
    many = subprocess.run(
        [sys.executable, "-m", "jobs.train_upsampler", *arguments({**asked, "workers": 999})],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert many.returncode == 2, many.stderr
