"""The training job, end to end: its results, and their use by the main job."""

import io
import json
import logging
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from pipeline.features.checkpoints import read_metadata, read_state_dict
from pipeline.features.provenance import check_pairing
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.jbu import JBU
from pipeline.upsamplers.lift.network import LiFT
from schemas.options import UpsampleConfig
from tests.helpers.stores import SHARED
from tests.helpers.trainings import (
    record,
    resnet18,
    same_tensors,
    table,
    tensors,
    train_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")


COCO = SHARED / "data" / "coco200" / "images"

LITE0 = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"

needs_shared = pytest.mark.skipif(not COCO.exists(), reason=f"needs the photographs and weights in {SHARED}")


def upsample_config(images: Path, store: Path, weights: Path, **changed: Any) -> UpsampleConfig:
    values = {
        "backbone": "resnet18", "weights": "random", "layer": "3", "size": "64", "components": 4, "shard_images": 4,
        "batch_size": 2, "device": "cpu", "workers": 0, "upsampler_weights": str(weights), **changed,
    }  # fmt: skip
    return UpsampleConfig(images=str(images), store=str(store), **values)


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


def test_the_main_job_takes_the_weights_for_any_backbone(undisturbed: Path, photographs: Path, tmp_path: Path) -> None:
    weights = undisturbed / "upsampler.safetensors"
    job = upsample_config(photographs / "train", tmp_path / "store", weights, backbone="resnet34", layer="2")
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
        ({"layer": "2"}, "128 channels|at layer 3 .* the backbone is resnet18 at layer 2 .* layer: weights 3, asked 2"),
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
    with pytest.raises(JobError, match=r"for the upsampler lift, but this job uses jbu"):
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
