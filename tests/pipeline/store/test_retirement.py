"""Rows that are taken out of use: what readers see, whoever is killed where."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from densefeat import FeatureStore, MissingFeatures, StoreError, StreamingFeatures, TorchFeatures, layout
from densefeat.conformance import problems
from densefeat.page.library import Library
from densefeat.rows.retired import Retired, read_retired
from densefeat.storage.objects import Objects
from pipeline.store.appending.growth import grow
from pipeline.store.layout import delete_store, existing_store, finish
from pipeline.store.repair import rebuild_tables, take_out
from pipeline.store.retirement import restore, restore_all, retire
from pipeline.store.verify import StoreCheck
from tests.helpers.killing import run_killed
from tests.helpers.stores import (
    FAILED_ROWS,
    NEW,
    ROWS,
    KnownStore,
    finished,
    growth,
    make_store,
    set_up_store,
    write_known_shard,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

REASON = "consent withdrawn"
OUT = (0, 5, FAILED_ROWS[1])
IN_USE = [row for row in range(ROWS) if row not in (*FAILED_ROWS, *OUT)]


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return make_store(str(tmp_path / "store"))


def object_bytes(uri: str) -> dict[str, bytes]:
    return {str(path.relative_to(uri)): path.read_bytes() for path in Path(uri).rglob("*") if path.is_file()}


def check_out_of_use(known: KnownStore, rows: tuple[int, ...] = OUT) -> FeatureStore:
    store = FeatureStore(known.uri)
    gone = {*rows, *FAILED_ROWS}
    assert store.rows_with_features.tolist() == [row for row in range(ROWS) if row not in gone]
    assert [row for row, status in enumerate(store.index["status"].to_pylist()) if status == "retired"] == sorted(rows)
    for row in rows:
        with pytest.raises(MissingFeatures, match=rf"row {row} \(class/{row:03}.jpg\) is retired: {REASON}") as caught:
            store.read(row)
        assert caught.value.status == "retired"
        with pytest.raises(MissingFeatures):
            store.read_codes(row)
        with pytest.raises(MissingFeatures):
            store.geometry(row)
    for row in set(range(ROWS)) - gone:
        np.testing.assert_array_equal(store.read_codes(row), known.codes[row])
    assert problems(store) == []
    assert StoreCheck(known.uri).store() == []
    return store


def test_readers_leave_retired_rows_out(known: KnownStore) -> None:
    assert retire(Objects(known.uri), OUT, REASON) == len(OUT)
    store = check_out_of_use(known)
    assert len(store) == ROWS
    assert store.row_of("class/005.jpg") == 5
    assert len(store.read(range(ROWS), missing="skip")) == len(IN_USE)
    assert np.isnan(store.read(range(ROWS), missing="nan")).all((1, 2, 3)).nonzero()[0].tolist() == sorted(
        {*OUT, *FAILED_ROWS}
    )
    copy = pickle.loads(pickle.dumps(store))
    assert copy.rows_with_features.tolist() == IN_USE
    assert TorchFeatures(known.uri).rows.tolist() == IN_USE
    streamed = [row for batch in StreamingFeatures(known.uri, batch_size=2) for row in batch["row"].tolist()]
    assert sorted(streamed) == IN_USE
    with pytest.raises(MissingFeatures):
        StreamingFeatures(known.uri, rows=[1, 5], batch_size=2)


def test_only_list_and_root_change(known: KnownStore) -> None:
    before = object_bytes(known.uri)
    retire(Objects(known.uri), OUT, REASON)
    after = object_bytes(known.uri)
    assert {key for key in after if after[key] != before.get(key)} - {layout.ATTRIBUTES} == {
        key for key in after if key.startswith(layout.RETIRED)
    }
    assert before.keys() <= after.keys()
    assert restore(Objects(known.uri), OUT) == len(OUT)
    assert json.loads(object_bytes(known.uri)[layout.ATTRIBUTES]) == json.loads(before[layout.ATTRIBUTES])


def test_each_change_adds_to_those_before(known: KnownStore) -> None:
    objects = Objects(known.uri)
    assert retire(objects, [5], REASON) == 1
    assert retire(objects, OUT, "something else") == 2
    assert retire(objects, OUT, "something else") == 0
    errors = FeatureStore(known.uri).index["error"].to_pylist()
    assert (errors[0], errors[5]) == ("something else", REASON)
    assert restore(objects, [5, 6]) == 1
    assert FeatureStore(known.uri).rows_with_features.tolist() == sorted([*IN_USE, 5])
    restore_all(objects)
    store = FeatureStore(known.uri)
    assert store.index["status"].to_pylist() == ["corrupt" if r in FAILED_ROWS else "ok" for r in range(ROWS)]
    assert "retired" not in store.attributes


def test_an_open_reader_goes_on(known: KnownStore) -> None:
    objects = Objects(known.uri)
    retire(objects, [5], REASON)
    store = FeatureStore(known.uri)
    for row in (0, 1, 3):
        retire(objects, [row], REASON)
    assert 0 in store.rows_with_features
    assert 5 not in store.rows_with_features


@pytest.mark.parametrize("what", ["retire", "restore"])
def test_killed_anywhere_all_rows_change_or_none(tmp_path: Path, what: str) -> None:
    for number in range(10):
        known = make_store(str(tmp_path / str(number)))
        objects = Objects(known.uri)
        retire(objects, [1], REASON)
        retire(objects, [1, 3], REASON)
        before = {1, 3}
        after = {1, 3, *OUT} if what == "retire" else {3}
        killed = run_killed(number, lambda objects=objects: change(objects, what))  # type: ignore[misc]
        retired = read_retired(objects, Retired.of(known.uri, FeatureStore(known.uri).attributes))["row"].to_pylist()
        assert set(retired) in (before, after)
        change(objects, what)
        check_out_of_use(known, tuple(sorted(after)))
        if not killed:
            assert number > 1
            return
    raise AssertionError("the change never came to its end")


def change(objects: Objects, what: str) -> None:
    if what == "retire":
        retire(objects, OUT, REASON)
    else:
        restore(objects, [1])


def test_rows_of_an_unfinished_store(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    records = [write_known_shard(known, 0)]
    retire(objects, OUT, REASON)
    assert FeatureStore(known.uri).index["status"].to_pylist()[:6] == [
        "retired",
        "ok",
        "corrupt",
        "ok",
        *["pending"] * 2,
    ]
    assert Library(known.uri).shown().counts["statuses"] == {"ok": 2, "corrupt": 1, "retired": 1, "pending": ROWS - 4}
    finish(objects, [*records, *(write_known_shard(known, shard) for shard in (1, 2))])
    check_out_of_use(known)


def test_they_stay_out_when_the_store_grows(known: KnownStore) -> None:
    objects = Objects(known.uri)
    retire(objects, OUT, REASON)
    grow(objects, growth())
    finished(known, ROWS + NEW)
    assert FeatureStore(known.uri).rows_with_features.tolist() == [*IN_USE, *range(ROWS, ROWS + NEW)]
    assert StoreCheck(known.uri).store() == []


def test_they_stay_out_when_the_store_is_repaired(known: KnownStore) -> None:
    objects = Objects(known.uri)
    retire(objects, OUT, REASON)
    take_out(objects, [1])
    assert FeatureStore(known.uri).index["status"].to_pylist()[3:8] == ["ok", *["pending"] * 4]
    finish(objects, [known.records[0], write_known_shard(known, 1), known.records[2]])
    check_out_of_use(known)
    rebuild_tables(objects, [])
    check_out_of_use(known)


@pytest.mark.parametrize("damage", ["missing", "a flipped bit", "another list", "the attribute"])
def test_a_lost_list_never_brings_rows_back(known: KnownStore, damage: str) -> None:
    objects = Objects(known.uri)
    retire(objects, [1], REASON)
    (other,) = objects.list(layout.RETIRED)
    retire(objects, OUT, REASON)
    (key,) = set(objects.list(layout.RETIRED)) - {other}
    if damage == "missing":
        objects.delete(key)
    elif damage == "a flipped bit":
        data = bytearray(objects.get(key))
        data[60] ^= 4
        objects.put(key, bytes(data))
    elif damage == "another list":
        objects.put(key, objects.get(other))
    else:
        root = json.loads(objects.get(layout.ATTRIBUTES))
        root["attributes"]["densefeat"]["retired"] = [1, 2]
        objects.put(layout.ATTRIBUTES, json.dumps(root).encode())
    store = FeatureStore(known.uri)
    for reading in (lambda: store.index, lambda: store.read(1), lambda: TorchFeatures(known.uri)):
        with pytest.raises(StoreError, match="retired"):
            reading()
    for found in (problems(store), StoreCheck(known.uri).store()):
        assert any("retired" in problem for problem in found)
    with pytest.raises(StoreError, match=r"--restore-all|attribute retired"):
        retire(objects, [7], REASON)
    restore_all(objects)
    retire(objects, OUT, REASON)
    check_out_of_use(known)


def test_the_list_belongs_to_the_store(known: KnownStore) -> None:
    objects = Objects(known.uri)
    retire(objects, OUT, REASON)
    attributes = existing_store(objects)
    assert attributes is not None
    assert attributes.retired is not None
    assert attributes.retired.rows == len(OUT)
    assert type(attributes).from_dict(attributes.to_dict()["densefeat"]) == attributes
    delete_store(objects)
    assert objects.list() == {}
