"""The main job as a command on Ray: killed, interrupted, refused. Nothing here is mocked."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.helpers.killing import wait_for

ROOT = Path(__file__).parents[2]
IMAGES, SHARD_IMAGES = 48, 4


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import skimage

    folder = tmp_path_factory.mktemp("photographs")
    picture = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png")
    for i in range(IMAGES):
        picture.crop((4 * i, 2 * i, 4 * i + 256, 2 * i + 256)).save(folder / f"{i:03}.jpg")
    return folder


def command(images: Path | str, store: Path, *more: str) -> list[str]:
    options = {
        "images": images, "store": store, "backbone": "resnet18", "weights": "random", "layer": 2, "size": 224,
        "components": 32, "shard-images": SHARD_IMAGES, "batch-size": 2, "device": "cpu",
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    on_ray = [] if "--workers" in more else ["--workers", "1"]  # which a job as small as this would do without
    return [sys.executable, "-m", "jobs.upsample_imagenet", *arguments, *on_ray, *more]


def run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def shards_done(store: Path) -> int:
    return len(list((store / "_ledger").glob("*.parquet")))


def shard_bytes(store: Path) -> dict[str, bytes]:
    # A worker killed while it writes leaves a part, which is nobody's.
    files = [path for path in (store / "features" / "c").rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def worker_processes(driver: int) -> list[psutil.Process]:
    """The workers below a driver, by their parents alone: psutil's own search also compares times of creation, which
    follow the clock of the machine, and misses processes when that is adjusted.
    """
    processes = {process.pid: process for process in psutil.process_iter(["ppid", "cmdline"])}
    below = {driver}
    while more := {pid for pid, process in processes.items() if process.info["ppid"] in below} - below:
        below |= more
    return [processes[pid] for pid in below & processes.keys() if _is_worker(processes[pid])]


def _is_worker(process: psutil.Process) -> bool:
    return "WorkerActor" in " ".join(process.info["cmdline"] or [])


@pytest.fixture(scope="module")
def undisturbed(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    finished = run(command(photographs, store, "--workers", "0"))
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    assert f"{IMAGES} with features, 0 failed" in finished.stderr
    return shard_bytes(store)


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_where_it_was(
    photographs: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    store = tmp_path / "store"
    moments: list[Callable[[], Any]] = [
        (store / "zarr.json").exists,  # while the store is set up, or just after
        # Amid writing; at the latest with eight of twelve shards done, as a write of milliseconds may not be seen.
        lambda: (done := shards_done(store)) >= 8 or (done >= 5 and any(store.rglob(".*.partial"))),
    ]
    for moment in moments:
        job = start(command(photographs, store, "--resume", "--workers", workers))
        children = wait_for(lambda job=job: worker_processes(job.pid)) if workers != "0" else []
        wait_for(moment)
        job.send_signal(signal.SIGKILL)
        job.communicate(timeout=60)
        # Ray's own processes notice that their driver is gone.
        psutil.wait_procs(children, timeout=60)
    assert shards_done(store) < len(undisturbed)
    for path in store.rglob(".*.partial"):
        os.utime(path, (0, 0))  # what was half-written is nobody's a day later
    finished = run(command(photographs, store, "--resume", "--workers", workers))
    assert finished.returncode == 0, finished.stderr
    assert shard_bytes(store) == undisturbed
    assert list(store.rglob(".*.partial")) == []


@pytest.mark.slow
def test_a_killed_worker_is_replaced(photographs: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = start(command(photographs, store))
    wait_for(lambda: shards_done(store) >= 2)
    for worker in worker_processes(job.pid):
        worker.kill()
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "which died" in said
    assert shard_bytes(store) == undisturbed


@pytest.mark.slow
def test_a_stopped_worker_is_replaced(photographs: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Alive, but it does not answer: as a device that hangs."""
    store = tmp_path / "store"
    job = start(command(photographs, store, "--stall-timeout-s", "5"))
    wait_for(lambda: shards_done(store) >= 2)
    for worker in worker_processes(job.pid):
        worker.send_signal(signal.SIGSTOP)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "no progress for 5 s" in said
    assert shard_bytes(store) == undisturbed


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on(photographs: Path, tmp_path: Path, number: signal.Signals) -> None:
    store = tmp_path / "store"
    job = start(command(photographs, store))
    wait_for(lambda: shards_done(store) >= 1)
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "interrupted" in said
    assert re.search(r"interrupted: [1-9]\d* of 12 shards are finished and kept; continue with --resume", said)
    assert "Traceback" not in said


def test_a_second_job_at_the_same_time_is_refused(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = start(command(photographs, store, "--workers", "0"))
    try:
        wait_for((store / "index.parquet").exists)
        job.send_signal(signal.SIGSTOP)  # until the second one is there
        second = start(command(photographs, store, "--workers", "0", "--resume"))
        assert second.stderr is not None
        said = next(line for line in second.stderr if "to see if another job is alive" in line)
        job.send_signal(signal.SIGCONT)
        said += second.communicate(timeout=60)[1]
        assert second.returncode == 2, said
        assert f"shards 0 to 11, in process {job.pid} on" in said
    finally:
        job.send_signal(signal.SIGCONT)
        assert job.communicate(timeout=300) is not None
    assert job.returncode == 0
    assert not (store / "_jobs").exists()


def test_interrupted_before_anything_is_stored(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = start(command(photographs, store, "--workers", "0"))
    assert job.stderr is not None
    said = next(line for line in job.stderr if "PCA: fitting" in line)
    job.send_signal(signal.SIGINT)
    said += job.communicate(timeout=60)[1]
    assert job.returncode == 130, said
    assert "interrupted: nothing was stored: run the same command again" in said
    assert not (store / "zarr.json").exists()


def test_without_ray_it_does_not_wait_for_a_shard(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = start(command(photographs, store, "--workers", "0", "--shard-images", str(IMAGES), "--batch-size", "1"))
    wait_for((store / "index.parquet").exists)  # then comes its one shard
    time.sleep(0.3)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "interrupted: the store was started, but no shard is finished: continue with --resume" in said
    assert "Traceback" not in said
    assert shards_done(store) == 0


@pytest.mark.parametrize(
    ("images", "more", "words"),
    [
        ("/nothing/here", (), "/nothing/here"),
        (None, ("--backbone", "resnet81"), "resnet18"),
        (None, ("--size", "abc"), "--size is in pixels"),
        (None, ("--no-such-option", "1"), "--no-such-option"),
        (None, ("--fit", "stretch"), "stretch"),
    ],
)
def test_refused_with_a_message_and_code_2(
    photographs: Path, tmp_path: Path, images: str | None, more: tuple[str, ...], words: str
) -> None:
    refused = run(command(images or photographs, tmp_path / "store", *more))
    assert refused.returncode == 2
    said = refused.stderr + refused.stdout
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "store" / "zarr.json").exists()
