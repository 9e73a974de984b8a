"""Ray and the workers start while the job is planned, if it needs them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import list_named_actors

from densefeat import layout
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from pipeline.run.planning.plan import make_plan
from pipeline.run.ray import crew
from pipeline.run.ray.cluster import connected
from pipeline.run.ray.early import EarlyWorkers
from tests.helpers.killing import wait_for
from tests.helpers.photographs import write_random_images
from tests.helpers.scripted_workers import SPEC, ScriptedWorker, make
from tests.helpers.upsample_jobs import config

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Ray's own

Listed = Callable[[int], None]
MANY = 10**6


def job(**options: Any) -> EarlyWorkers:
    return EarlyWorkers(config("images", "store", **options))


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"workers": 0}, MANY),
        ({"workers": 1, "dry_run": True}, MANY),
        ({"workers": None}, 1000),
        ({"workers": None, "shards": "0:1"}, MANY),
    ],
)
def test_nothing_starts_for_a_job_without_ray(options: dict[str, Any], images: int) -> None:
    def plan(listed: Listed) -> str:
        listed(images)
        return "planned"

    with job(**options) as early:
        assert early.beside(plan) == "planned"
        assert early.chosen is None
    assert not ray.is_initialized()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_plan_arrive(workers: int) -> None:
    def plan(listed: Listed) -> str:
        raise JobError("no such folder")

    with job(workers=workers) as early, pytest.raises(JobError, match="no such folder"):
        early.beside(plan)
    assert not ray.is_initialized()


def test_an_interrupt_does_not_wait_for_the_plan() -> None:
    over = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background

    def plan(listed: Listed) -> bool:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return over.wait(60)

    with job(workers=1) as early, pytest.raises(KeyboardInterrupt):
        early.beside(plan)
    signal.signal(signal.SIGINT, before)
    assert not over.is_set()
    over.set()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)  # for tests.helpers
        with connected():
            yield


@pytest.fixture
def idle(cluster: None) -> None:
    """All of the cluster is free, and the driver knows it: the workers of another test are gone.

    What `ray.available_resources` says is some reports old, so it may tell of the time before another test's workers
    started. It has caught up when it tells of an actor that started after they ended.
    """

    class Probe:  # here, so that Ray need not import it
        pass

    there = ray.cluster_resources()
    probe = ray.remote(Probe).options(num_cpus=there["CPU"], memory=2**20).remote()
    wait_for(lambda: ray.available_resources()["memory"] < there["memory"])
    ray.kill(probe)
    wait_for(lambda: ray.available_resources().get("CPU") == there["CPU"])


@pytest.mark.usefixtures("idle")
@pytest.mark.timeout(300)
def test_workers_are_placed_while_the_plan_is_made() -> None:
    def plan(listed: Listed) -> str:
        assert list_named_actors() == []
        listed(MANY)
        wait_for(list_named_actors)
        return "planned"

    with job(workers=1) as early:
        assert early.beside(plan) == "planned"
        assert early.chosen is not None
        assert early.chosen.device == "cpu"
        assert list_named_actors() == ["densefeat worker 1"]
    wait_for(lambda: not list_named_actors())
    assert ray.is_initialized()  # the connection is not its own


@pytest.mark.usefixtures("idle")
@pytest.mark.timeout(300)
def test_only_workers_that_fit_are_placed_early() -> None:
    """On a cluster that grows, a job that may still be refused asks for no further nodes."""
    room = int(ray.available_resources()["CPU"])
    with job(workers=room + 3) as early:
        early.beside(lambda listed: listed(MANY))
        assert len(list_named_actors()) == room
        assert early.chosen is not None
        assert early.chosen.workers.count == room + 3
    wait_for(lambda: not list_named_actors())


@pytest.mark.usefixtures("idle")
@pytest.mark.timeout(300)
def test_a_long_plan_is_no_lack_of_nodes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(crew, "_FIRST_WARNING_S", 2.0)
    with job(workers=1) as early:
        early.beside(lambda listed: listed(MANY))
        assert early.chosen is not None
        wait_for(list_named_actors)
        time.sleep(3)
        early.chosen.workers.build(SPEC.on("cpu", 1), make)
        assert [result for _, result in early.chosen.workers.map(ScriptedWorker.double, [(4,)])] == [8]
    assert "no worker has started" not in caplog.text


STRIKE = """
import os, signal, sys, threading, time

def on_stack(frame):
    while frame is not None:
        if frame.f_code.co_name == "init" and "ray" in frame.f_code.co_filename:
            return True
        frame = frame.f_back

def strike(main=threading.get_ident()):
    while not on_stack(sys._current_frames()[main]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=strike, daemon=True).start()
from jobs.command_line import run
from jobs.upsample_imagenet import upsample
from schemas.options import UpsampleConfig
run(UpsampleConfig, upsample, "", interrupted="nothing was stored")
"""


@pytest.mark.timeout(300)
def test_a_signal_while_ray_starts_interrupts_the_job(tmp_path: Path) -> None:
    """Ray handles SIGTERM by itself until it has started."""
    images = write_random_images(tmp_path / "images", 4)
    options = [f"--images={images}", f"--store={tmp_path / 'store'}", "--backbone=resnet18", "--weights=random"]
    command = [sys.executable, "-c", STRIKE, *options, "--device=cpu", "--workers=1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert ended.returncode == 130, ended.stderr
    assert "interrupted: nothing was stored" in ended.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("idle")
@pytest.mark.timeout(300)
def test_a_plan_that_fails_later_ends_the_workers() -> None:
    def plan(listed: Listed) -> str:
        listed(MANY)
        wait_for(list_named_actors)
        raise JobError("no such backbone")

    with pytest.raises(JobError, match="no such backbone"), job(workers=1) as early:
        early.beside(plan)
    wait_for(lambda: not list_named_actors())


@pytest.mark.usefixtures("idle")
def test_workers_that_the_cluster_lacks_are_refused_after_the_plan() -> None:
    ended = threading.Event()

    def plan(listed: Listed) -> str:
        listed(MANY)
        time.sleep(0.5)
        ended.set()
        return "planned"

    with job(workers=1, device="cuda") as early, pytest.raises(JobError, match="there is no GPU"):
        early.beside(plan)
    assert ended.is_set()


def test_the_images_of_a_finished_store_are_not_announced(tmp_path: Path) -> None:
    asked = config(write_random_images(tmp_path / "images", 6), tmp_path / "store")
    announced = list[int]()
    plan = make_plan(asked, announced.append)
    assert announced == [plan.references.num_rows]
    assert upsample(asked) == 0
    make_plan(replace(asked, resume=True), announced.append)
    assert len(announced) == 1
    (tmp_path / "store" / layout.MANIFEST).unlink()
    make_plan(replace(asked, resume=True), announced.append)
    assert len(announced) == 2
