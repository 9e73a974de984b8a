"""The training job in parts: resumed, killed, interrupted, on an object store, by several workers."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from jobs.train_upsampler import train_upsampler
from pipeline.errors import JobError
from pipeline.upsamplers.build import build_upsampler
from tests.helpers.killing import wait_for
from tests.helpers.trainings import newest_step, options, record, resnet18, same_tensors, start, train_config

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_training_whose_record_is_lost_is_not_gone_on_with(
    undisturbed: Path, photographs: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "training")
    config = train_config(photographs, tmp_path / "training", steps=9, resume=True)
    checkpoint = tmp_path / "training" / "checkpoints" / "step_00000008.pt"
    plain = torch.load(checkpoint, weights_only=True)
    plain["model"].popitem()
    torch.save(plain, checkpoint)
    with pytest.raises(JobError, match=r"(?s)checkpoint of step 8 .* is for another network.*Missing key"):
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
    with pytest.raises(JobError, match=r"already holds a training: pass --resume to continue it"):
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
    assert "a worker died; training continues" in said
    records = [record(tmp_path / name)["losses.csv"].splitlines() for name in ("undisturbed", "killed")]
    assert records[0] == records[1][: len(records[0])]
