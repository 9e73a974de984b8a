"""The figures of a store: failures, and the seconds of finished and unfinished stores."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from densefeat import command_line, layout
from densefeat.layout import FeatureLayout
from densefeat.page import create_app
from densefeat.page.library import Ledger, Library
from densefeat.page.listing import without_features
from densefeat.rows.index import read_index
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from pipeline.store.layout import finish
from schemas.ledger import LedgerRecord
from tests.densefeat.page.stores import replace_columns
from tests.helpers.stores import ROWS, SHARD_ROWS, H, K, KnownStore, W, make_store, set_up_store, write_known_shard

FEATURES = FeatureLayout(ROWS, K, H, W, "int8", SHARD_ROWS)
SECONDS = ({"read": 1.5, "backbone": 4.0}, {"read": 0.25, "write": 0.5}, {"backbone": 2.0})


def write_timed_shard(store: KnownStore, shard: int) -> LedgerRecord:
    record = replace(write_known_shard(store, shard), seconds=SECONDS[shard], made_by={"device": f"cuda {shard % 2}"})
    Objects(store.uri).put(layout.ledger_key(shard), record.to_bytes())
    return record


def test_an_unfinished_store_has_the_figures_of_its_shards(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    library = Library(store.uri)
    found = library.shown().figures
    assert (found["seconds"], found["shards"], found["timed_images"]) == (None, 0, 0)
    records = [write_timed_shard(store, 0), write_timed_shard(store, 1)]
    found = Library(store.uri).shown().figures
    assert found["seconds"] == {"backbone": 4.0, "read": 1.75, "write": 0.5}
    assert list(found["seconds"]) == ["backbone", "read", "write"]
    assert (found["shards"], found["timed_images"]) == (2, 7)
    assert found["devices"] == {"cuda 0": 1, "cuda 1": 1}
    finish(Objects(store.uri), [*records, write_timed_shard(store, 2)])
    client = TestClient(create_app(store.uri), base_url="http://127.0.0.1:8000")
    ended = client.get("/api/figures").json()
    assert ended["seconds"] == {"backbone": 6.0, "read": 1.75, "write": 0.5}
    assert (ended["shards"], ended["timed_images"]) == (3, ROWS - 2)


def test_records_are_read_once_and_damaged_ones_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = set_up_store(str(tmp_path / "store"))
    for shard in range(3):
        write_timed_shard(store, shard)
    expected = read_index(Objects(store.uri), FEATURES, store.configuration_hash)
    place = tmp_path / "store" / layout.ledger_key(1)
    good = place.read_bytes()
    place.write_bytes(good[: len(good) // 2])
    with caplog.at_level(logging.WARNING):
        ledger = Ledger(Objects(store.uri), FEATURES, store.configuration_hash).read_on(1.0)
        assert ledger.read_on(1.0) is ledger
    assert caplog.text.count("000001.parquet is damaged") == 1
    assert ledger.sums.figures()["shards"] == 2
    assert ledger.index.equals(read_index(Objects(store.uri), FEATURES, store.configuration_hash))
    place.write_bytes(good)
    (tmp_path / "store" / layout.ledger_key(2)).write_bytes(b"not read again")
    complete = ledger.read_on(1.0)
    assert complete.sums.figures()["seconds"] == {"backbone": 6.0, "read": 1.75, "write": 0.5}
    assert complete.index.equals(expected)
    assert ledger.sums.figures()["shards"] == 2
    place.unlink()  # by a repair
    assert complete.read_on(1.0).sums.figures()["seconds"] == SECONDS[0]


@pytest.mark.parametrize("damage", ["of another shard", "without facts", "without columns"])
def test_records_that_do_not_fit_leave_their_rows_pending(tmp_path: Path, damage: str) -> None:
    store = set_up_store(str(tmp_path / "store"))
    record = write_timed_shard(store, 0)
    table = read_parquet(record.to_bytes())
    if damage == "without columns":
        table = table.drop_columns(["chunk_offset"])
    if damage == "without facts":
        table = table.replace_schema_metadata(None)
    place = layout.ledger_key(int(damage == "of another shard"))
    Objects(store.uri).put(layout.ledger_key(0), b"")
    Objects(store.uri).put(place, parquet_bytes(table))
    ledger = Ledger(Objects(store.uri), FEATURES, store.configuration_hash).read_on(1.0)
    assert set(ledger.index["status"].to_pylist()) == {"pending"}
    assert ledger.sums.figures()["shards"] == 0


def test_failures_are_counted_once_for_page_and_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(str(tmp_path / "store"))
    statuses = ["ok", "corrupt", "corrupt", "too_small", "ok", "corrupt", "pending", "ok", "pending", "ok", "ok"]
    errors = [None, "cut", "no header", "2 pixels", None, "no header", None, None, None, None, None]
    replace_columns(store.uri, status=statuses, error=errors)
    index = read_index(Objects(store.uri), FEATURES, store.configuration_hash)
    assert without_features(index) == [
        {"status": "corrupt", "error": "no header", "rows": 2, "first": 2},
        {"status": "pending", "error": None, "rows": 2, "first": 6},
        {"status": "corrupt", "error": "cut", "rows": 1, "first": 1},
        {"status": "too_small", "error": "2 pixels", "rows": 1, "first": 3},
    ]
    client = TestClient(create_app(store.uri), base_url="http://127.0.0.1:8000")
    assert [one["rows"] for one in client.get("/api/figures").json()["failures"]] == [2, 1, 1]
    with pytest.raises(SystemExit):
        command_line.main(["info", store.uri, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["statuses"] == {"ok": 5, "corrupt": 3, "pending": 2, "too_small": 1}
    assert facts["examples"] == {
        "corrupt": "class/001.jpg: cut", "too_small": "class/003.jpg: 2 pixels", "pending": "class/006.jpg"
    }  # fmt: skip


def test_many_records_are_read_bit_by_bit(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    record = write_timed_shard(store, 0)
    objects, features = Objects(store.uri), replace(FEATURES, rows=100 * SHARD_ROWS)
    index = pa.concat_tables([read_index(objects, FEATURES, "").slice(0, SHARD_ROWS)] * 100)
    numbers = pa.array(range(100 * SHARD_ROWS), pa.int64())
    objects.put(layout.INDEX, parquet_bytes(index.set_column(0, index.schema.field(0), numbers)))
    for shard in range(96):
        rows = pa.array(features.rows_of(shard), pa.int64())
        outcomes = record.outcomes.set_column(0, record.outcomes.schema.field(0), rows)
        objects.put(layout.ledger_key(shard), replace(record, shard=shard, outcomes=outcomes).to_bytes())
    for shard in range(96, 100):
        objects.put(layout.ledger_key(shard), b"damaged")
    ledgers = [Ledger(objects, features, store.configuration_hash).read_on(0.0)]
    while ledgers[-1].unread:
        ledgers.append(ledgers[-1].read_on(0.0))
    assert [(ledger.sums.figures()["shards"], ledger.unread) for ledger in ledgers] == [
        (32, 68), (64, 36), (96, 4), (96, 0)]  # fmt: skip
    assert [ledger.index["status"].to_pylist().count("ok") for ledger in ledgers] == [96, 192, 288, 288]
    assert ledgers[-1].sums.figures()["seconds"] == {"backbone": 384.0, "read": 144.0}
    assert ledgers[-1].read_on(0.0) is ledgers[-1]
