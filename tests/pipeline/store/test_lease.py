"""Leases of jobs on their shards: one job at a time, whoever dies, stands still or comes back."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from densefeat import layout
from densefeat.storage.objects import Objects
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.io.process import Process, this_process
from pipeline.run import job
from pipeline.store.layout import delete_store, foreign_keys, remains
from pipeline.store.lease import Lease
from tests.helpers.killing import FORK, wait_for
from tests.helpers.photographs import write_random_images
from tests.helpers.servers.s3_proxy import S3Proxy
from tests.helpers.upsample_jobs import config

BEAT_S, DEAD_S = 0.02, 0.6


def lease(objects: Objects, shards: range | None) -> Lease:
    return Lease(objects, shards, beat_s=BEAT_S, dead_s=DEAD_S)


def hold(objects: Objects, entered: Any, leave: Any) -> None:
    """In a child: hold a lease; the exit code is 3 if it is lost."""
    with lease(objects, range(4)) as held:
        entered.set()
        leave.wait(60)
        for _ in range(1000):
            try:
                held.check()
            except JobError:
                os._exit(3)
            time.sleep(0.01)


@contextmanager
def holding(objects: Objects) -> Iterator[Any]:
    """Another process that holds a lease on the shards 0 to 3."""
    entered, leave = FORK.Event(), FORK.Event()
    child = FORK.Process(target=hold, args=(objects, entered, leave))
    child.start()
    child.leave = leave
    try:
        assert entered.wait(30)
        yield child
    finally:
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (range(4), range(4), True), (range(4), range(3, 9), True), (range(3, 9), range(4), True),
        (range(9), range(2, 3), True), (None, range(2, 3), True), (range(2, 3), None, True), (None, None, True),
        (range(4), range(4, 8), False), (range(4, 8), range(4), False),
    ],
)  # fmt: skip
def test_a_second_job_on_the_same_shards_is_refused(
    tmp_path: Path, first: range | None, second: range | None, refused: bool
) -> None:
    objects = Objects(tmp_path / "store")
    with lease(objects, first), ExitStack() as stack:
        if refused:
            advice = "or stop it$" if second is None else "or give each job its own --shards$"
            with pytest.raises(JobError, match=rf"at work on .*store: .* in process {os.getpid()} on .*{advice}"):
                stack.enter_context(lease(objects, second))
        else:
            stack.enter_context(lease(objects, second))
        assert len(objects.list(layout.JOBS)) == 2 - refused
    assert list(tmp_path.iterdir()) == []
    with lease(objects, second):
        pass


@pytest.mark.parametrize("jobs", [2, 5])
def test_of_jobs_that_start_together_one_goes_on(tmp_path: Path, jobs: int) -> None:
    """Whichever comes first; the others are refused, and nobody waits for the time of a dead job."""
    for turn in range(6):
        objects, barrier = Objects(tmp_path / str(turn)), threading.Barrier(jobs)
        working, refused, over = [0], list[str](), threading.Event()

        def one(objects: Objects, barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                with Lease(objects, range(4), beat_s=BEAT_S, dead_s=60.0) as held:
                    working[0] += 1  # noqa: B023
                    over.wait(30)  # noqa: B023
                    held.check()
            except JobError as error:
                refused.append(str(error))  # noqa: B023

        threads = [threading.Thread(target=one, args=(Objects(objects.uri), barrier)) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        wait_for(lambda: working[0] and len(refused) == jobs - 1)  # noqa: B023
        over.set()
        for thread in threads:
            thread.join()
        assert working == [1]
        assert all("at work on" in error for error in refused)


def test_a_killed_job_on_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "store")
    with holding(objects) as child:
        os.kill(child.pid, signal.SIGKILL)
        wait_for(lambda: Path(f"/proc/{child.pid}/stat").read_text().split(") ")[1].startswith("Z"))  # nobody reaped it
        begun = time.monotonic()
        with Lease(objects, range(4), beat_s=BEAT_S, dead_s=60.0):
            assert time.monotonic() - begun < 10
            assert len(objects.list(layout.JOBS)) == 1


def test_a_job_that_stands_still_is_replaced_and_stops_when_it_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Objects(tmp_path / "store")
    with holding(objects) as child:
        os.kill(child.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with lease(objects, range(2)) as held:
            assert time.monotonic() - begun > DEAD_S
            assert f"takes its place: shards 0 to 3, in process {child.pid}" in caplog.text
            os.kill(child.pid, signal.SIGCONT)
            child.leave.set()
            child.join(30)
            assert child.exitcode == 3
            held.check()
            assert len(objects.list(layout.JOBS)) == 1  # the one that came back left this one alone


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": "another boot", "host": "another"},
        {"machine": None, "started": None},  # not on Linux
        {"since": "2099-01-01T00:00:00Z"},  # its clock is wrong, and it is still the same process
        {"shards": "of a later version"},
    ],
)
def test_a_lease_that_stands_still_counts_for_a_while(tmp_path: Path, changed: dict[str, Any]) -> None:
    """What another machine left, or somebody else: watched by the clock of the one who waits."""
    objects = Objects(tmp_path / "store")
    with lease(objects, range(4)):
        (key,) = objects.list(layout.JOBS)
        left = json.loads(objects.get(key)) | changed
    objects.put(key, json.dumps(left).encode())
    begun = time.monotonic()
    with lease(objects, range(2)):
        assert time.monotonic() - begun > DEAD_S
        assert objects.list(layout.JOBS).keys() - {key} == objects.list(layout.JOBS).keys()


def test_bytes_that_are_no_lease(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "store")
    objects.put(layout.job_key("0" * 32), b"\x00\xff not JSON")
    begun = time.monotonic()
    with lease(objects, range(2)):
        assert time.monotonic() - begun > DEAD_S


def test_a_process_is_known_to_have_ended_only_on_its_machine() -> None:
    own = this_process()
    assert not own.has_ended()
    assert not Process("host", own.pid, own.machine, own.started).has_ended()
    assert Process(own.host, own.pid, own.machine, (own.started or 0) + 1).has_ended()  # its number was given out again
    assert Process(own.host, 2**22 + 1, own.machine, own.started).has_ended()  # beyond the highest number of Linux
    assert not Process(own.host, 2**22 + 1, "another boot", own.started).has_ended()
    assert not Process(own.host, 2**22 + 1, None, None).has_ended()
    assert not Process(own.host, own.pid, own.machine, None).has_ended()
    assert not Process(own.host, 1, own.machine, None).has_ended()  # of another user, unless these tests are root's


@pytest.mark.s3
def test_a_count_that_is_delivered_late_brings_no_job_back(s3_bucket: str, s3_proxy: S3Proxy) -> None:
    """Storage delivers a PUT of the first job when the second one has deleted its lease."""
    objects = Objects(f"{s3_bucket}/store")
    with lease(objects, range(4)) as first:
        (key,) = objects.list(layout.JOBS)
        held_back, replaced, delivered = threading.Event(), threading.Event(), list[str]()

        def late(method: str, path: str) -> str:
            if method == "PUT" and path.endswith(key):
                held_back.set()
                assert replaced.wait(30)
            return ""

        s3_proxy.fault = late
        s3_proxy.passed = lambda method, path, body, status: delivered.append(path) if method == "PUT" else None
        assert held_back.wait(30)
        delivered.clear()
        with lease(objects, range(2)) as second:
            replaced.set()
            wait_for(lambda: any(path.endswith(key) for path in delivered))
            wait_for(first._lost.is_set)
            with pytest.raises(JobError, match=r"the lease of this job on .* is gone"):
                first.check()
            wait_for(lambda: key not in objects.list(layout.JOBS))
            time.sleep(10 * BEAT_S)
            second.check()
            assert len(objects.list(layout.JOBS)) == 1
    assert objects.list() == {}


@pytest.mark.parametrize("making", [True, False])
def test_a_lease_that_its_job_lost_comes_back(tmp_path: Path, making: bool) -> None:
    """The job that took its place deletes it, and goes on; the lease of another job that makes the shards ends it."""
    objects = Objects(tmp_path / "store")
    elsewhere = {"machine": "another boot", "host": "another"}
    with lease(objects, range(4)):
        (key,) = objects.list(layout.JOBS)
        late = json.dumps(json.loads(objects.get(key)) | elsewhere | {"making": making}).encode()
    objects.put(key, late)
    with lease(objects, range(2)) as held:
        for _ in range(3):
            objects.put(key, late)
            wait_for(lambda: key not in objects.list(layout.JOBS))
        held.check()
        objects.put(layout.job_key("0" * 32), late)
        if making:
            wait_for(held._lost.is_set)
        else:
            time.sleep(10 * BEAT_S)
            held.check()


@pytest.mark.s3
def test_storage_that_fails_for_a_while_costs_no_lease(
    s3_bucket: str, s3_proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Objects(f"{s3_bucket}/store")
    with lease(objects, range(4)) as held:
        s3_proxy.fault = lambda method, path: "503"
        wait_for(lambda: "could not be renewed" in caplog.text)
        s3_proxy.fault = lambda method, path: ""
        (key,) = objects.list(layout.JOBS)
        before = objects.get(key)
        wait_for(lambda: objects.get(key) != before)
        held.check()
    assert objects.list() == {}


def test_leases_are_no_parts_of_a_store(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "store")
    with lease(objects, None) as held:
        assert foreign_keys(objects) == remains(objects) == []
        delete_store(objects)
        time.sleep(3 * BEAT_S)
        held.check()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_random_images(tmp_path / "images", 12)


def test_jobs_on_one_store(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed job, one that overwrites, and a repair meet a job that is at work; one on other shards does not."""
    monkeypatch.setattr(job, "Lease", lease)
    store = tmp_path / "store"
    assert upsample(config(images, store, shards="0:1")) == 0
    objects = Objects(store)
    with lease(objects, range(2)):
        for options in ({"resume": True}, {"overwrite": True}, {"resume": True, "shards": "1:"}):
            with pytest.raises(JobError, match="at work on"):
                upsample(config(images, store, **options))
        objects.put(layout.shard_key(0), b"damaged")
        monkeypatch.setattr("pipeline.store.lease.Lease", lease)
        with pytest.raises(JobError, match="at work on"):
            verify(VerifyConfig(store=str(store), repair=True))
        assert objects.get(layout.shard_key(0)) == b"damaged"
        assert upsample(config(images, store, resume=True, shards="2:3")) == 0
    assert verify(VerifyConfig(store=str(store), repair=True)) == 1
    objects.put(layout.job_key("0" * 32), json.dumps({"left": "by a job on other shards"}).encode())
    assert upsample(config(images, store, resume=True)) == 0
    assert verify(VerifyConfig(store=str(store))) == 0
    assert not (store / layout.JOBS).exists()


def test_a_job_whose_lease_is_gone_stops(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Lease", lease)
    objects = Objects(tmp_path / "store")
    prepared = job.prepare

    def prepare_and_lose(*arguments: Any) -> Any:
        encoding = prepared(*arguments)
        end = time.monotonic() + 10 * BEAT_S
        while time.monotonic() < end:  # a beat on its way brings the lease back, as it would for a job that took over
            for key in objects.list(layout.JOBS):
                objects.delete(key)
            time.sleep(BEAT_S / 4)
        return encoding

    monkeypatch.setattr(job, "prepare", prepare_and_lose)
    with pytest.raises(JobError, match=r"the lease of this job on .* is gone"):
        upsample(config(images, objects.uri))
    assert objects.list(layout.JOBS) == {}
    monkeypatch.setattr(job, "prepare", prepared)
    assert upsample(config(images, objects.uri, resume=True)) == 0
