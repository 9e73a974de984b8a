"""The training job, end to end: in this process where that is enough, as a command where it is not."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from densefeat import FeatureStore
from jobs.demo import write_weights
from jobs.train_upsampler import train_upsampler
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.checkpoints import read_metadata, read_state_dict
from pipeline.features.provenance import check_pairing
from pipeline.train.objectives import jbu as jbu_training
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.jbu import JBU
from pipeline.upsamplers.lift.network import LiFT
from schemas.options import UpsampleConfig
from tests.helpers.stores import SHARED
from tests.helpers.trainings import arguments, options, train_config, write_photographs

ROOT = Path(__file__).parents[2]
COCO = SHARED / "data" / "coco200" / "images"
LITE0 = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
needs_shared = pytest.mark.skipif(not COCO.exists(), reason=f"needs the photographs and weights in {SHARED}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Everywhere: sums over another number of threads differ in the last bit, and here all bits are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder / "train", 6)
    write_photographs(folder / "val", 3, first=6)
    return folder


@pytest.fixture(scope="module")
def undisturbed(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of eight steps that nothing interrupts."""
    output = tmp_path_factory.mktemp("undisturbed") / "training"
    assert train_upsampler(train_config(photographs, output, steps=8)) == 0
    return output


def record(output: Path) -> dict[str, str]:
    return {name: (output / name).read_text() for name in ("losses.csv", "held_out.csv")}


def table(output: Path, name: str) -> dict[str, list[Any]]:
    return dict(pyarrow.csv.read_csv(output / name).to_pydict())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(str(path))


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def resnet18(layer: int) -> Backbone:
    return build_backbone("resnet18", size=(64, 64), weights="random", layer=layer)


def upsample_config(images: Path, store: Path, weights: Path, **changed: Any) -> UpsampleConfig:
    values = {
        "backbone": "resnet18", "weights": "random", "layer": 3, "size": "64", "components": 4, "shard_images": 4,
        "batch_size": 2, "device": "cpu", "workers": 0, "upsampler_weights": str(weights), **changed,
    }  # fmt: skip
    return UpsampleConfig(images=str(images), store=str(store), **values)


# --- What comes out ---


def test_what_a_training_leaves(undisturbed: Path, photographs: Path) -> None:
    losses, held_out = table(undisturbed, "losses.csv"), table(undisturbed, "held_out.csv")
    assert losses["step"] == list(range(1, 9))
    assert set(losses) == {"step", "backbone", "loss", "likelihood", "crf"}
    assert held_out["step"] == [0, 2, 4, 6, 8]
    for baseline in ("bilinear", "training_free"):
        assert len(set(held_out[f"{baseline}_relative_error"])) == 1
    assert len(set(held_out["jbu_relative_error"])) == 5
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "step_00000006.pt",
        "step_00000008.pt",
    ]
    metadata = read_metadata(str(undisturbed / "upsampler.safetensors"))
    assert json.loads(metadata["backbones"]) == [json.loads(json.dumps(resnet18(3).identity()))]
    expected = {"upsampler": "jbu", "final": "off", "steps": "8", "images": "6", "seed": "0"}
    assert {name: metadata[name] for name in expected} == expected
    errors = json.loads(metadata["held_out_errors"])["resnet18@3"]
    assert errors["jbu"]["relative"] == pytest.approx(held_out["jbu_relative_error"][-1])
    assert json.loads(metadata["versions"])["torch"] == torch.__version__.partition("+")[0]
    assert json.loads(metadata["configuration"])["images"]["images"] == str(photographs / "train")
    assert len(metadata["commit"]) >= 7
    assert (undisturbed / "upsampler.safetensors").stat().st_size < 120_000


def test_it_learns(photographs: Path, tmp_path: Path) -> None:
    """Real features, as those of random weights hardly depend on what is where; from FeatUp's start, which blurs."""
    write_weights(tmp_path / "lite0.safetensors")
    config = train_config(
        photographs, tmp_path / "training", backbones=(f"tf_efficientnet_lite0@-2={tmp_path / 'lite0.safetensors'}",),
        steps=20, learning_rate=3e-3, initial_sigma=1.0, evaluate_every=20, checkpoint_every=20,
    )  # fmt: skip
    assert train_upsampler(config) == 0
    losses, held_out = (table(tmp_path / "training", name) for name in ("losses.csv", "held_out.csv"))
    assert np.mean(losses["likelihood"][-6:]) < np.mean(losses["likelihood"][:6]) - 0.02
    first, last = held_out["jbu_relative_error"]
    assert last < first - 0.02


@needs_shared
@pytest.mark.slow
def test_it_learns_more_than_interpolation_on_photographs(tmp_path: Path) -> None:
    config = train_config(
        tmp_path, tmp_path / "training", images=str(COCO / "train"), val_images=str(COCO / "val"),
        backbones=(f"tf_efficientnet_lite0@-2={LITE0}",), held_out_backbone=f"tf_efficientnet_lite0@2={LITE0}",
        size="96", val_count=8, steps=60, jitters=5, max_pad_px=20, projection_chs=30, evaluate_every=60,
    )  # fmt: skip
    assert train_upsampler(config) == 0
    held_out = table(tmp_path / "training", "held_out.csv")
    assert held_out["trained_on"] == [1, 0, 1, 0]
    trained_on = {name: values[2] for name, values in held_out.items()}
    assert trained_on["jbu_relative_error"] < trained_on["bilinear_relative_error"] - 0.03
    assert trained_on["jbu_relative_error"] < trained_on["training_free_relative_error"] - 0.03


def test_several_backbones_take_turns_and_one_is_only_measured_on(photographs: Path, tmp_path: Path) -> None:
    config = train_config(
        photographs, tmp_path / "training", backbones=("resnet18@3=random", "resnet18@2=random"),
        held_out_backbone="resnet10t@3=random", evaluate_every=4,
    )  # fmt: skip
    assert train_upsampler(config) == 0
    labels = ["resnet18@3", "resnet18@2"]
    assert table(tmp_path / "training", "losses.csv")["backbone"] == 2 * labels
    held_out = table(tmp_path / "training", "held_out.csv")
    assert held_out["backbone"] == 2 * [*labels, "resnet10t@3"]
    assert held_out["trained_on"] == 2 * [1, 1, 0]
    metadata = read_metadata(str(tmp_path / "training" / "upsampler.safetensors"))
    assert [one["layer"] for one in json.loads(metadata["backbones"])] == [3, 2]


def test_backbones_that_results_could_not_tell_apart(photographs: Path, tmp_path: Path) -> None:
    torch.save(resnet18(3).model.state_dict(), tmp_path / "other.pth")
    for changed, words in [
        ({"backbones": ("resnet18@3=random", "resnet18@-2=random")}, ("resnet18@-2=random", "--backbones resnet18@3")),
        ({"held_out_backbone": f"resnet18@3={tmp_path}/other.pth"}, ("--held-out-backbone", "--backbones resnet18@3")),
        ({"held_out_backbone": "resnet18@3=random"}, ("--held-out-backbone", "--backbones resnet18@3")),
    ]:
        with pytest.raises(JobError, match="are both resnet18 at layer 3") as caught:
            train_upsampler(replace(train_config(photographs, tmp_path / "training"), **changed))
        assert all(word in str(caught.value) for word in words)


def test_the_main_job_takes_the_weights_for_any_backbone(undisturbed: Path, photographs: Path, tmp_path: Path) -> None:
    weights = undisturbed / "upsampler.safetensors"
    job = upsample_config(photographs / "train", tmp_path / "store", weights, backbone="resnet34", layer=2)
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    assert store.index["status"].to_pylist() == ["ok"] * 6
    digest = build_upsampler("jbu", str(weights), resnet18(2)).identity()["weights"]
    assert store.attributes["configuration"]["upsampler"] == {"name": "jbu", "weights": digest}


def test_weights_with_a_final_convolution_are_for_one_backbone(photographs: Path, tmp_path: Path) -> None:
    featup = tmp_path / "featup.pth"
    config = train_config(
        photographs, tmp_path / "training", final=True, steps=2, featup_checkpoint=str(featup), evaluate_every=2
    )
    assert train_upsampler(config) == 0
    weights = tmp_path / "training" / "upsampler.safetensors"
    assert upsample(upsample_config(photographs / "train", tmp_path / "store", weights)) == 0
    for changed, words in (
        ({"layer": 2}, "128 channels|at layer 3 .* the backbone is resnet18 at layer 2 .* layer: weights 3, asked 2"),
        ({"backbone": "resnet34"}, "for resnet18 at layer 3 .* the backbone is resnet34 at layer 3"),
    ):
        with pytest.raises(JobError, match=words):
            upsample(upsample_config(photographs / "train", tmp_path / "other", weights, **changed))
    assert same_tensors(weights, featup) is False  # FeatUp's names have a prefix
    ours, theirs = (build_upsampler("jbu", str(path), resnet18(3)) for path in (weights, featup))
    assert ours.identity() == theirs.identity()


def test_featups_layout_has_a_final_convolution_that_adds_nothing(photographs: Path, tmp_path: Path) -> None:
    featup = tmp_path / "featup.ckpt"
    config = train_config(photographs, tmp_path / "training", steps=1, featup_checkpoint=str(featup), evaluate_every=9)
    assert train_upsampler(config) == 0
    state = torch.load(featup, weights_only=True)["state_dict"]
    assert all(name.startswith("upsampler.") for name in state)
    assert state["upsampler.fixup_proj.1.weight"].shape == (256, 256, 1, 1)
    ours = JBU.from_weights(str(tmp_path / "training" / "upsampler.safetensors"), 256)
    theirs = JBU.from_weights(str(featup), 256)
    low, images = torch.randn(1, 256, 4, 4), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        high = ours.forward_full(low, images, (64, 64))
        torch.testing.assert_close(theirs.forward_full(low, images, (64, 64)), high)


def test_a_stack_without_its_final_convolution_has_to_say_so(undisturbed: Path, tmp_path: Path) -> None:
    torch.save(tensors(undisturbed / "upsampler.safetensors"), tmp_path / "silent.pth")
    with pytest.raises(JobError, match=r"fixup_proj\.1\.weight"):
        build_upsampler("jbu", str(tmp_path / "silent.pth"), resnet18(2))


def test_metadata_of_others_says_nothing_and_damaged_ones_are_named(undisturbed: Path, tmp_path: Path) -> None:
    weights, ours = tmp_path / "weights.safetensors", {"format": "densefeat-upsampler-1", "final": "on"}
    state = tensors(undisturbed / "upsampler.safetensors")
    for backbones in ("not json", "[]", "{}", "[1]", '{"name": 1}'):
        save_file(state, weights, {"backbones": backbones, "upsampler": "theirs"})
        check_pairing(str(weights), "jbu", resnet18(3))
        save_file(state, weights, {"backbones": backbones, **ours})
        with pytest.raises(JobError, match=r"got the backbones .* in its metadata .* damaged"):
            check_pairing(str(weights), "jbu", resnet18(3))


def test_lift(photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = train_config(photographs, tmp_path / "training", upsampler="lift", backbones=("resnet18@2=random",))
    assert train_upsampler(config) == 0
    weights = str(tmp_path / "training" / "upsampler.safetensors")
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["upsampler"], metadata["patch"]) == ("lift", "8")
    LiFT.from_state(read_state_dict(weights), patch=int(metadata["patch"]), num_chs=128)
    names = {"step", "backbone", "loss", "octave_1", "consistency"}
    assert set(table(tmp_path / "training", "losses.csv")) == names
    assert train_upsampler(replace(config, resume=True, steps=5)) == 0
    before = record(tmp_path / "training")
    assert train_upsampler(replace(config, resume=True, steps=3)) == 0
    assert "nothing to train: --steps 3, and step 5 is done" in caplog.text
    assert record(tmp_path / "training") == before
    upsampler = build_upsampler("lift", weights, resnet18(2))
    assert upsampler.identity()["patch"] == 8
    with pytest.raises(JobError, match=r"for resnet18 at layer 2 .* resnet18 at layer 1 .* cell: weights 8, asked 4"):
        build_upsampler("lift", weights, resnet18(1))
    with pytest.raises(JobError, match=r"of the upsampler lift, asked is jbu"):
        build_upsampler("jbu", weights, resnet18(2))


def test_lift_is_the_same_whether_features_are_kept(photographs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"upsampler": "lift", "backbones": ("resnet18@2=random",), "batch_size": 2, "steps": 7}
    without, kept, parts = (
        train_config(photographs, tmp_path / name, **options) for name in ("without", "kept", "parts")
    )
    assert train_upsampler(replace(without, cache_gb=0)) == 0
    assert train_upsampler(kept) == 0
    assert train_upsampler(replace(parts, steps=4)) == 0
    assert train_upsampler(replace(parts, resume=True)) == 0
    for name in ("kept", "parts"):
        assert record(tmp_path / name) == record(tmp_path / "without")
        assert same_tensors(*(tmp_path / one / "upsampler.safetensors" for one in (name, "without")))


# --- Going on ---


def test_resumed_it_has_the_same_record_and_weights(photographs: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = train_config(photographs, tmp_path / "parts", resume=True)
    assert train_upsampler(config) == 0
    assert train_upsampler(replace(config, steps=6, checkpoint_every=3)) == 0
    # A checkpoint that was cut short: the one before it is good.
    newest = tmp_path / "parts" / "checkpoints" / "step_00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert train_upsampler(replace(config, steps=8)) == 0
    assert record(tmp_path / "parts") == record(undisturbed)
    assert same_tensors(*(path / "upsampler.safetensors" for path in (tmp_path / "parts", undisturbed)))
    # Nothing left to do: the result is written again.
    (tmp_path / "parts" / "upsampler.safetensors").unlink()
    assert train_upsampler(replace(config, steps=8)) == 0
    assert same_tensors(*(path / "upsampler.safetensors" for path in (tmp_path / "parts", undisturbed)))


def start(config_options: dict[str, Any]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.train_upsampler", *arguments(config_options), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


def newest_step(output: Path) -> int:
    return max((int(path.stem.removeprefix("step_")) for path in output.glob("checkpoints/*.pt")), default=0)


def test_killed_it_goes_on(photographs: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "training"
    job = start(options(photographs, output, steps=800, checkpoint_every=1, evaluate_every=800))
    wait_for(lambda: newest_step(output) >= 2 and any(output.rglob(".*.partial")))  # while it writes
    job.kill()
    job.communicate(timeout=60)
    steps = max(newest_step(output) + 1, 8)
    assert train_upsampler(train_config(photographs, output, steps=steps, resume=True)) == 0
    losses = record(undisturbed)["losses.csv"].splitlines()
    assert record(output)["losses.csv"].splitlines()[: len(losses)] == losses


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on(
    photographs: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "training"
    job = start(options(photographs, output, steps=800, checkpoint_every=1))
    wait_for(lambda: newest_step(output) >= 1)
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "interrupted" in said
    assert "--resume" in said
    assert "Traceback" not in said
    steps = max(newest_step(output) + 1, 8)
    assert train_upsampler(train_config(photographs, output, steps=steps, resume=True)) == 0
    for name, text in record(undisturbed).items():
        lines = text.splitlines()
        assert record(output)[name].splitlines()[: len(lines)] == lines


# --- What goes wrong ---


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
    assert newest_step(tmp_path / "training") == 0
    # Nothing is lost if it begins anew there, as the message says.
    assert train_upsampler(train_config(photographs, tmp_path / "training", steps=1)) == 0


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
    with pytest.raises(JobError, match=r"takes 256 places .* got 1 images of 4×4\. Give more .* --lift-initial random"):
        train_upsampler(asked)
    assert train_upsampler(replace(asked, lift_initial="random")) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": "/nothing/here"}, "/nothing/here"),
        ({"val_images": None, "val_share": 1e-9}, "held-out views: got 0 images, expected --val-count 2"),
        ({"val_count": 4}, "held-out views: got 3 images, expected --val-count 4"),
        ({"val_images": "{images}"}, "6 of them are among --images too"),
        ({"val_images": None, "val_share": 0.999999, "val_count": 1}, "no image is left to train on"),
        ({"backbones": ("resnet81",)}, "resnet18"),
        ({"backbones": ("resnet18@9",)}, "layer 9"),
        ({"backbones": ("resnet18@4=random",), "size": "32"}, "a grid of 1×1 at --size 32"),
        ({"upsampler": "lift", "size": "72"}, "expected multiples of 16"),
        ({"upsampler": "lift", "size": "80", "lift_octaves": 2}, "expected multiples of 32"),
        ({"output": "/proc/training"}, "--output /proc/training"),
        ({"featup_checkpoint": "/proc/here/jbu.pth"}, "--featup-checkpoint /proc/here/jbu.pth"),
        ({"output": "{images}"}, "lie in each other: give --output a folder of its own"),
        ({"device": "cuda"}, "CUDA"),
    ],
)
def test_what_is_refused_before_work(photographs: Path, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    if "device" in changed and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if changed.get("val_images"):
        changed = {"val_images": str(photographs / "train")}
    asked = dict(changed)
    output = asked.pop("output", str(tmp_path / "training")).format(images=photographs / "train" / "training")
    with pytest.raises(JobError) as caught:
        train_upsampler(train_config(photographs, output, **asked))
    assert words in str(caught.value)
    assert not (tmp_path / "training").exists()


def test_a_training_whose_record_is_lost_is_not_gone_on_with(
    undisturbed: Path, photographs: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "training")
    config = train_config(photographs, tmp_path / "training", steps=9, resume=True)
    checkpoint = tmp_path / "training" / "checkpoints" / "step_00000008.pt"
    plain = torch.load(checkpoint, weights_only=True)
    plain["model"].popitem()
    torch.save(plain, checkpoint)
    with pytest.raises(JobError, match=r"(?s)checkpoint of step 8 .* is of another network.*Missing key"):
        train_upsampler(config)
    claim = tmp_path / "training" / "training.json"
    claim.write_text(claim.read_text()[:-200])
    with pytest.raises(JobError, match=r"its training.json is damaged"):
        train_upsampler(config)
    claim.unlink()
    for resume in (True, False):
        with pytest.raises(JobError, match=r"has checkpoints, but no training.json"):
            train_upsampler(replace(config, resume=resume))


def test_backbones_take_turns_in_the_order_that_they_began_in(photographs: Path, tmp_path: Path) -> None:
    backbones = ("resnet18@2=random", "resnet18@3=random")
    config = train_config(photographs, tmp_path / "training", steps=2, backbones=backbones)
    assert train_upsampler(config) == 0
    with pytest.raises(JobError, match=r'turns: stored \["resnet18@2", "resnet18@3"\], asked \["resnet18@3"'):
        train_upsampler(replace(config, resume=True, steps=3, backbones=backbones[::-1]))


def test_another_training_is_not_gone_on_with(undisturbed: Path, photographs: Path) -> None:
    config = train_config(photographs, undisturbed, steps=8)
    with pytest.raises(JobError, match=r"has a training already: --resume goes on with it"):
        train_upsampler(config)
    changed = {"seed": 1, "jitters": 3, "backbones": ("resnet18@2=random",), "max_pixels": 10**6, "min_side": 9}
    with pytest.raises(JobError) as caught:
        train_upsampler(replace(config, resume=True, held_out_backbone="resnet18@3=random", **changed))
    for line in (
        "geometry.max_pixels: stored 178956970, asked 1000000",
        "geometry.min_side: stored 8, asked 9",
        "held_out.backbone: stored null",
        "training.seed: stored 0, asked 1",
        "training.jitters: stored 2, asked 3",
        "backbones.resnet18@2: stored null",
    ):
        assert line in str(caught.value)


# --- Where images and checkpoints may be ---


def test_all_kinds_of_sources_train_the_same(photographs: Path, undisturbed: Path, tmp_path: Path) -> None:
    files = sorted((photographs / "train").iterdir())
    with tarfile.open(tmp_path / "images-0.tar", "w") as tar:
        for path in files:
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    pq.write_table(pa.table({"image": [path.read_bytes() for path in files]}), tmp_path / "images.parquet")
    expected = record(undisturbed)["losses.csv"].splitlines()[:3]
    for number, images in enumerate((tmp_path / "images-0.tar", tmp_path / "images.parquet")):
        config = train_config(photographs, tmp_path / f"training{number}", images=str(images), steps=2)
        assert train_upsampler(config) == 0
        assert record(tmp_path / f"training{number}")["losses.csv"].splitlines() == expected


@pytest.mark.s3
def test_checkpoints_in_an_object_store(photographs: Path, undisturbed: Path, s3_bucket: str) -> None:
    import s3fs

    config = train_config(photographs, f"{s3_bucket}/training", steps=2, resume=True)
    assert train_upsampler(config) == 0
    assert train_upsampler(replace(config, steps=4)) == 0
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    losses = files.cat_file(f"{s3_bucket}/training/losses.csv").decode()
    assert losses.splitlines() == record(undisturbed)["losses.csv"].splitlines()[:5]
    build_upsampler("jbu", f"{s3_bucket}/training/upsampler.safetensors", resnet18(1))


# --- Several workers ---


@pytest.mark.slow
def test_two_workers_one_of_which_dies(photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="Ray Train needs the extra train")
    asked = options(photographs, tmp_path / "undisturbed", workers=2, steps=6)
    job = start(asked)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    asked["output"] = str(tmp_path / "killed")
    job = start({**asked, "steps": 200, "checkpoint_every": 1})
    wait_for(lambda: newest_step(tmp_path / "killed") >= 2)
    workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    reached = newest_step(tmp_path / "killed")
    workers[0].kill()
    wait_for(lambda: newest_step(tmp_path / "killed") > reached + 4)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "a worker died, training goes on" in said
    records = [record(tmp_path / name)["losses.csv"].splitlines() for name in ("undisturbed", "killed")]
    assert records[0] == records[1][: len(records[0])]


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
    assert "none of 3 can be used" in said
    assert "Traceback" not in said
    environment = {**os.environ, "RAY_ADDRESS": ""}
    many = subprocess.run(
        [sys.executable, "-m", "jobs.train_upsampler", *arguments({**asked, "workers": 999})],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert many.returncode == 2, many.stderr
