"""A store that changes while its page is open."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from densefeat.layout import INDEX
from densefeat.page import create_app
from densefeat.page.library import Library, Shown
from densefeat.storage.objects import Objects
from pipeline.store.layout import finish
from tests.helpers.stores import ROWS, make_store, set_up_store, write_known_shard


def eventually(library: Library, condition: Callable[[Shown], bool]) -> Shown:
    """The store as shown once the condition is true."""
    for _ in range(200):
        if condition(shown := library.shown()):
            return shown
        time.sleep(0.02)
    raise AssertionError(library.shown().counts)


def test_a_store_that_is_being_made_grows_until_it_is_finished(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    library = Library(store.uri, refresh_s=0)
    assert library.shown().counts["statuses"] == {"pending": ROWS}
    records = [write_known_shard(store, 0)]
    first = eventually(library, lambda shown: shown.counts["statuses"].get("ok") == 3)
    first.sample.add(0, first.features.seen(0))
    records += [write_known_shard(store, 1)]
    second = eventually(library, lambda shown: shown.counts["statuses"].get("ok") == 7)
    assert second.features.seen(0) is first.features.seen(0)
    assert len(second.sample) == 1
    finish(Objects(store.uri), [*records, write_known_shard(store, 2)])
    last = eventually(library, lambda shown: shown.finished)
    assert last.counts["statuses"] == {"ok": ROWS - 2, "corrupt": 2}
    assert library.shown() is last
    assert (library.generation, library.problem) == (0, None)


def test_nothing_is_opened_again_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = set_up_store(str(tmp_path / "store"))
    write_known_shard(store, 0)
    library = Library(store.uri, refresh_s=0)
    read: list[str] = []
    get = Objects.get

    def watched(self: Objects, key: str) -> bytes:
        read.append(key)
        return get(self, key)

    monkeypatch.setattr(Objects, "get", watched)
    shown = library.shown()
    eventually(library, lambda _: read.count("zarr.json") > 3)
    assert library.shown() is shown
    assert not {key for key in read if key.endswith(".parquet")}


def test_no_request_waits_for_a_slow_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = set_up_store(str(tmp_path / "store"))
    library = Library(store.uri, refresh_s=0)
    answered = threading.Event()
    exists = Objects.exists

    def slow(self: Objects, key: str) -> bool:
        assert answered.wait(20)
        return exists(self, key)

    monkeypatch.setattr(Objects, "exists", slow)
    shown = library.shown()
    assert all(library.shown() is shown for _ in range(100))
    assert [thread.name for thread in threading.enumerate()].count("densefeat-page-library") == 1
    write_known_shard(store, 0)
    answered.set()
    eventually(library, lambda shown: shown.counts["statuses"].get("ok") == 3)


def test_a_store_that_is_removed_and_made_again(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    write_known_shard(store, 0)
    library = Library(store.uri, refresh_s=0)
    shutil.rmtree(store.uri)
    shown = eventually(library, lambda _: library.problem is not None)
    assert "zarr.json" in str(library.problem)
    assert shown.counts["statuses"]["ok"] == 3
    make_store(store.uri, "float16")
    last = eventually(library, lambda shown: shown.finished)
    assert (last.store.layout.dtype, library.problem, library.generation) == ("float16", None, 1)


def test_the_page_says_that_the_store_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library.__init__, "__kwdefaults__", {"refresh_s": 0})
    store = set_up_store(str(tmp_path / "store"))
    write_known_shard(store, 0)
    client = TestClient(create_app(store.uri), base_url="http://localhost")
    (tmp_path / "store" / INDEX).unlink()
    shutil.rmtree(store.uri)
    for _ in range(100):
        if client.get("/api/store").json()["problem"]:
            break
        time.sleep(0.02)
    else:
        raise AssertionError
    answer = client.get("/api/colours/0")
    assert answer.status_code == 500
    assert "missing" in answer.json()["error"]


def test_each_page_has_addresses_of_its_own(tmp_path: Path) -> None:
    uri = make_store(str(tmp_path / "store")).uri
    one, other = (TestClient(create_app(uri), base_url="http://localhost") for _ in range(2))
    assert one.get("/api/store").json()["version"] != other.get("/api/store").json()["version"]
