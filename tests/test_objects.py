import multiprocessing
import os
import pickle
import signal
import socket
import time
from pathlib import Path

import fsspec
import pytest

from densefeat.objects import TEMPORARY, Objects, split_uri


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


def test_deleting(objects: Objects) -> None:
    objects.put("a", b"1")
    objects.put("b/c", b"2")
    objects.delete("a")
    objects.delete("a")
    assert objects.list() == {"b/c": 1}


def test_local_paths_are_absolute_and_uris_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Objects("a/../b").uri == Objects("~/b/").uri == str(tmp_path / "b")
    assert Objects("s3://bucket/b/").uri == "s3://bucket/b"
    assert split_uri("s3://bucket/a/basis.npz") == ("s3://bucket/a", "basis.npz")
    assert split_uri("basis.npz") == (str(tmp_path), "basis.npz")


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
    others = tmp_path / TEMPORARY / "another-machine-1-abc"
    others.parent.mkdir(exist_ok=True)
    others.write_bytes(b"")
    own = tmp_path / TEMPORARY / f"{socket.gethostname()}-{os.getpid()}-abc"
    own.write_bytes(b"")
    objects = Objects(str(tmp_path))
    objects.tidy()
    assert set(objects.list()) == {"object", f"{TEMPORARY}/{others.name}", f"{TEMPORARY}/{own.name}"}
    others.unlink()
    own.unlink()
    objects.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["object"]
