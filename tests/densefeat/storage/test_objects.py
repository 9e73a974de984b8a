import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from benchmarks.chaos.nodes import build_wrong_clock
from densefeat.errors import StorageUnavailable
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.io.storage import check_writable
from tests.helpers.servers.s3_proxy import S3Proxy


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "local":
        return Objects(str(tmp_path / "objects"))
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return Objects("memory://objects")
    return Objects(request.getfixturevalue("s3_bucket") + "/objects")


def test_what_is_put_can_be_got(objects: Objects) -> None:
    objects.put("a/b/c", b"0123456789")
    assert objects.get("a/b/c") == b"0123456789"
    assert objects.get_range("a/b/c", 2, 5) == b"234"
    assert objects.get_range("a/b/c", 8, 12) == b"89"
    assert objects.get_range("a/b/c", 10, 12) == objects.get_range("a/b/c", 20, 22) == b""
    assert objects.get_range("a/b/c", 5, 5) == b""
    assert objects.exists("a/b/c")
    objects.put("a/b/c", b"new")
    assert objects.get("a/b/c") == b"new"
    with pytest.raises(FileNotFoundError):
        objects.get("a/b/d")


def test_listing_has_sizes_and_nothing_half_written(objects: Objects) -> None:
    assert objects.list() == {}
    for key, size in {"x": 1, "a/1": 2, "a/2": 3, "a/deep/3": 0}.items():
        objects.put(key, bytes(size))
    assert objects.list() == {"a/1": 2, "a/2": 3, "a/deep/3": 0, "x": 1}
    assert objects.list("a") == {"a/1": 2, "a/2": 3, "a/deep/3": 0}
    assert objects.list("none") == {}
    objects.put("a/4", b"later")
    assert "a/4" in objects.list("a")


def test_creating_happens_once(objects: Objects) -> None:
    objects.create("once", b"first")
    with pytest.raises(FileExistsError):
        objects.create("once", b"second")
    assert objects.get("once") == b"first"


def test_creating_the_same_again_is_a_lost_answer(objects: Objects) -> None:
    objects.create("once", b"mine")
    objects.create("once", b"mine")
    assert objects.size("once") == 4
    assert objects.size("none") is None
    assert not objects.exists("on")


def test_deleting(objects: Objects) -> None:
    objects.put("a", b"1")
    objects.put("b/c", b"2")
    objects.delete("a")
    objects.delete("a")
    assert objects.list() == {"b/c": 1}


def _in_child(objects: Objects, queue: "multiprocessing.Queue[bytes]") -> None:
    objects.put("child", b"here")
    queue.put(objects.get("parent"))


@pytest.mark.s3
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_used_handle_works_in_a_child(s3_bucket: str, start_method: str) -> None:
    objects = Objects(s3_bucket)
    objects.put("parent", b"there")
    context = multiprocessing.get_context(start_method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(objects, queue))
    child.start()
    assert queue.get(timeout=60) == b"there"
    child.join(60)
    assert child.exitcode == 0
    assert objects.get("child") == b"here"


def test_pickles_without_its_connection(objects: Objects) -> None:
    objects.put("a", b"1")
    again = pickle.loads(pickle.dumps(objects))
    assert again.uri == objects.uri
    assert again._opened is None


def _write_for_ever(folder: str) -> None:
    objects = Objects(folder)
    for content in range(256):
        objects.put("object", bytes([content]) * 8_000_000)
    time.sleep(60)


def test_a_killed_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    for delay_ms in (20, 50, 90, 140):
        child = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(tmp_path),))
        child.start()
        while not (tmp_path / "object").exists():
            time.sleep(0.01)
        time.sleep(delay_ms / 1000)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        data = Objects(str(tmp_path)).get("object")
        assert len(data) == 8_000_000
        assert len(set(data)) == 1
    assert set(Objects(str(tmp_path)).list()) == {"object"}


@pytest.mark.s3
def test_outages_are_waited_out_and_lost_answers_are_not_somebody_else(s3_bucket: str, s3_proxy: S3Proxy) -> None:
    objects = Objects(f"{s3_bucket}/flaky", patience_s=30)
    objects.put("a", b"0")  # connected
    for operation, method, expected in (
        (lambda: objects.create("new", b"1"), "PUT", None),
        (lambda: objects.put("a", b"2"), "PUT", None),
        (lambda: objects.get("a"), "GET", b"2"),
        (lambda: objects.size("a"), "HEAD", 1),
        (lambda: objects.list(), "GET", {"a": 1, "new": 1}),
        (lambda: objects.delete("a"), "DELETE", None),
    ):
        for fault in ("lose", "503"):
            faults = [fault] * 2
            s3_proxy.fault = lambda m, p, method=method, faults=faults: (  # type: ignore[misc]
                faults.pop() if m == method and faults else ""
            )
            assert operation() == expected  # type: ignore[no-untyped-call]
            assert faults == []


OPERATIONS = """
import sys
from densefeat.errors import WrongClock
from densefeat.storage.objects import Objects

objects = Objects(sys.argv[1])
for operation in (lambda: objects.get("x"), lambda: objects.size("x"), lambda: objects.list(),
                  lambda: objects.get_range("x", 0, 1), lambda: objects.put("y", b"y"),
                  lambda: objects.create("y", b"y"), lambda: objects.delete("x")):
    try:
        operation()
    except WrongClock as error:
        print(error)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the library that moves the clock")
@pytest.mark.parametrize("seconds", [3600, -3600, 60])
def test_a_clock_that_is_off(s3_endpoint: str, s3_bucket: str, tmp_path: Path, seconds: int) -> None:
    """With a server that refuses it as S3 does; moto's does not."""
    Objects(s3_bucket).put("x", b"x")
    clock = {"LD_PRELOAD": str(build_wrong_clock(tmp_path)), "WRONG_CLOCK_S": str(seconds)}
    with S3Proxy(s3_endpoint, checks_clocks=True).running() as proxy:
        environment = {**os.environ, **clock, "AWS_ENDPOINT_URL": proxy.endpoint}
        command = [sys.executable, "-c", OPERATIONS, s3_bucket]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert len(told) == (0 if seconds == 60 else 7), done.stderr
    assert all("refuses all its requests: set the clock" in line for line in told)
    assert Objects(s3_bucket).list() == ({"y": 1} if seconds == 60 else {"x": 1})


@pytest.mark.parametrize("times", [1, 2, 1000])
def test_a_disk_that_fails_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    objects = Objects(tmp_path, patience_s=3 if times < 1000 else 0.5)
    failures, fsync = [errno.EIO] * times, os.fsync

    def failing(descriptor: int) -> None:
        if failures:
            raise OSError(failures.pop(), "a failure that passes")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    if times == 1000:
        with pytest.raises(StorageUnavailable, match=f"{tmp_path}/a did not answer"):
            objects.create("a", b"1")
    else:
        objects.create("a", b"1")
        assert objects.get("a") == b"1"
    assert {path.name for path in tmp_path.iterdir()} == ({"a"} if times < 1000 else set())


@pytest.mark.s3
@pytest.mark.parametrize(
    ("method", "within", "fault", "words"),
    [
        ("PUT", "", "403", "cannot create an object"),
        ("PUT", "", "drop-If-None-Match", "cannot prevent two jobs from creating the same object"),
        ("GET", "/_check/", "403", "cannot "),
        ("GET", "/_check/", "drop-Range", "cannot read a part"),
        ("GET", "list-type=2", "403", "cannot list objects"),
        ("DELETE", "", "403", "cannot delete an object"),
    ],
)
def test_storage_that_lacks_something_is_found_before_work(
    s3_bucket: str, s3_proxy: S3Proxy, method: str, within: str, fault: str, words: str
) -> None:
    s3_proxy.fault = lambda m, path: fault if m == method and within in path else ""
    with pytest.raises(JobError, match=rf"--store here\b.*the storage {words}") as raised:
        check_writable(Objects(f"{s3_bucket}/store"), "--store here")
    assert str(raised.value).count("--store here") == 1
    s3_proxy.fault = lambda method, path: ""
    if method != "DELETE":
        assert Objects(s3_bucket).list() == {}


@pytest.mark.s3
def test_storage_that_can_do_all_is_left_as_it_was(s3_bucket: str) -> None:
    check_writable(Objects(f"{s3_bucket}/store"), "--store here")
    assert Objects(s3_bucket).list() == {}
