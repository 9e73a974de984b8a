"""Files written whole, exclusively and without a trace, on file systems with and without hard links."""

import errno
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from densefeat.storage import local_files
from densefeat.storage.local_files import STALE_S, LocalFolder, is_temporary
from densefeat.storage.objects import Objects

NO_LINKS = ("EPERM", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "EXDEV")
FORK = multiprocessing.get_context("fork")  # children here do nothing but write files

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def take_links_away(code: int) -> None:
    def link(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), str(arguments[0]))

    os.link = link


@pytest.fixture(params=[None, *NO_LINKS])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFolder:
    if request.param:
        monkeypatch.setattr(os, "link", os.link)  # put back afterwards
        take_links_away(getattr(errno, request.param))
    return LocalFolder(tmp_path / "top")


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_creating_happens_once_and_leaves_nothing_else(folder: LocalFolder) -> None:
    folder.create("a/b", b"first")
    with pytest.raises(FileExistsError):
        folder.create("a/b", b"second")
    folder.put("a/c", b"1")
    with pytest.raises(FileExistsError):
        folder.create("a/c", b"2")
    folder.put("a/c", b"3")
    assert {key: folder.get(key) for key in folder.list("")} == {"a/b": b"first", "a/c": b"3"}
    assert all_files(folder.root) == ["a/b", "a/c"]


def test_other_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", os.link)
    take_links_away(errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        LocalFolder(tmp_path).create("a", b"1")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        LocalFolder(tmp_path).put("file/below", b"1")
    assert all_files(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "写" * 85, "a", ".a", "with.dots.and.suffix", "a b"])
def test_any_name_can_be_written(folder: LocalFolder, name: str) -> None:
    folder.create(name, b"1")
    folder.put(name, b"2")
    assert folder.list("") == {name: 1}
    assert not is_temporary(name)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(folder: LocalFolder, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder.create("a", b"1")
        folder.put("b", b"1")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((folder.root / name).stat().st_mode) for name in "ab"] == [0o666 & ~umask] * 2


def create_together(root: str, name: str, content: bytes, barrier: Barrier, code: int | None, won: object) -> None:
    if code is not None:
        take_links_away(code)
    for turn in range(40):
        barrier.wait(60)
        try:
            LocalFolder(Path(root)).create(f"{name}{turn}", content)
        except FileExistsError:
            continue
        won.put((turn, content))  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [None, errno.EPERM])
def test_of_many_that_create_at_once_one_does(tmp_path: Path, code: int | None) -> None:
    barrier, won = FORK.Barrier(4), FORK.Queue()
    contents = [bytes([i]) * 5000 for i in range(4)]
    children = [
        FORK.Process(target=create_together, args=(str(tmp_path), "a", content, barrier, code, won))
        for content in contents
    ]
    for child in children:
        child.start()
    winners = sorted(won.get(timeout=120) for _ in range(40))
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [turn for turn, _ in winners] == list(range(40))
    assert [LocalFolder(tmp_path).get(f"a{turn}") for turn in range(40)] == [content for _, content in winners]
    assert won.empty()
    assert len(all_files(tmp_path)) == 40


def create_and_die(root: str, killed_at: str) -> None:
    take_links_away(errno.ENOSYS)

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if killed_at == "claimed":
        local_files._refuse_existing = die
    else:
        Path.replace = die  # type: ignore[assignment, method-assign]
    LocalFolder(Path(root)).create("a", b"of the dead")


@pytest.mark.parametrize("killed_at", ["claimed", "replacing"])
def test_the_claim_of_a_killed_writer_is_void_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    child = FORK.Process(target=create_and_die, args=(str(tmp_path), killed_at))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    folder = LocalFolder(tmp_path)
    assert folder.list("") == {}
    assert len(all_files(tmp_path)) == 2  # what it wrote, and its claim
    monkeypatch.setattr(os, "link", os.link)
    take_links_away(errno.ENOSYS)
    monkeypatch.setattr(local_files, "_CLAIM_STALE_S", 0.5)
    began = time.monotonic()
    folder.create("a", b"of the living")
    assert time.monotonic() - began < 10
    assert folder.get("a") == b"of the living"


def age(path: Path, seconds: float) -> None:
    now = time.time()
    os.utime(path, (now - seconds, now - seconds))


def test_sweeping_takes_what_is_old_and_half_written(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    objects.put("deep/down/a", b"1")
    old = [f".{name}.{'0' * 32}.partial" for name in ("a", "b c", "zarr.json")] + [".a.creating.partial"]
    others = ["a.partial", ".a.partial", f"a.{'0' * 32}.partial", f".{'0' * 32}.partial", f".a.{'g' * 32}.partial"]
    for below in ("", "deep/down/"):
        for name in [*old, *others]:
            (tmp_path / f"{below}{name}").write_bytes(b"")
            age(tmp_path / f"{below}{name}", STALE_S + 60)
        for name, seconds in ((f".a.{'1' * 32}.partial", 0), (f".a.{'2' * 32}.partial", STALE_S - 600)):
            (tmp_path / f"{below}{name}").write_bytes(b"")
            age(tmp_path / f"{below}{name}", seconds)
    kept = [*others, f".a.{'1' * 32}.partial", f".a.{'2' * 32}.partial"]
    assert set(objects.list()) == {"deep/down/a", *others, *(f"deep/down/{name}" for name in others)}
    objects.sweep(deep=False)
    assert all_files(tmp_path) == sorted([*kept, "deep/down/a", *(f"deep/down/{name}" for name in [*old, *kept])])
    objects.sweep()
    assert all_files(tmp_path) == sorted([*kept, "deep/down/a", *(f"deep/down/{name}" for name in kept)])
    Objects(tmp_path / "nothing").sweep()


@pytest.mark.parametrize("operation", ["put", "create"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = LocalFolder(tmp_path)
    for name in ("fsync", "link" if operation == "create" else "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                getattr(folder, operation)("a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_writing_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fail)
    LocalFolder(tmp_path).put("a", b"1")
    assert LocalFolder(tmp_path).get("a") == b"1"


def test_only_folders_that_were_made_go(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir(mode=0o2770)
    (tmp_path / "prepared").chmod(0o2770)
    for below in ("prepared", "prepared/new/deeper", "other/new"):
        folder = LocalFolder(tmp_path / below)
        with folder.leaving_no_folders():
            folder.put("x/y", b"1")
            folder.delete("x/y")
        with folder.leaving_no_folders():
            folder.put("kept", b"1")
        folder.delete("kept")
    assert stat.S_IMODE((tmp_path / "prepared").stat().st_mode) == 0o2770
    assert (tmp_path / "prepared/new/deeper").is_dir()
    assert (tmp_path / "other/new").is_dir()
    assert all_files(tmp_path) == []
    assert not (tmp_path / "prepared/x").exists()


def write_and_delete(root: str, barrier: Barrier) -> None:
    folder = LocalFolder(Path(root))
    barrier.wait(60)
    for _ in range(200):
        with folder.leaving_no_folders():
            folder.put(f"deep/down/{os.getpid()}", b"1")
            folder.delete(f"deep/down/{os.getpid()}")


def test_folders_can_go_while_others_write(tmp_path: Path) -> None:
    barrier = FORK.Barrier(3)
    children = [FORK.Process(target=write_and_delete, args=(str(tmp_path / "top"), barrier)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert all_files(tmp_path) == []


def list_for_ever(root: str, barrier: Barrier, missing: object) -> None:
    folder = LocalFolder(Path(root))
    barrier.wait(60)
    for _ in range(300):
        if not {"a/1", "a/2"} <= set(folder.list("")):
            missing.put("a")  # type: ignore[attr-defined]
            return
    missing.put("")  # type: ignore[attr-defined]


def test_a_listing_is_whole_while_others_write(tmp_path: Path) -> None:
    """A file that vanishes during a listing must not take its folder with it."""
    folder = LocalFolder(tmp_path)
    for name in ("1", "2"):
        folder.put(f"a/{name}", b"1")
    barrier, missing = FORK.Barrier(2), FORK.Queue()
    child = FORK.Process(target=list_for_ever, args=(str(tmp_path), barrier, missing))
    child.start()
    barrier.wait(60)
    while child.is_alive():
        folder.put("a/3", b"1")
        folder.delete("a/3")
    assert missing.get(timeout=10) == ""
    child.join(10)


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "top").mkdir()
    (tmp_path / "top/features").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "top/loop").symlink_to(tmp_path / "top")
    (tmp_path / "top/self").symlink_to(tmp_path / "top/self")
    (tmp_path / "top/broken").symlink_to(tmp_path / "nothing")
    folder = LocalFolder(tmp_path / "top")
    folder.put("features/1", b"12")
    assert set(folder.list("")) == {"features/1", "self"}
    assert (tmp_path / "elsewhere/1").read_bytes() == b"12"


@pytest.mark.parametrize("read", [lambda o: o.exists("a"), lambda o: o.list(), lambda o: o.get("a")])
def test_a_storage_that_fails_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Objects], object]
) -> None:
    objects = Objects(tmp_path, patience_s=0)
    objects.put("a", b"1")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("stat", "scandir"):
        monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(PermissionError):
        read(objects)
