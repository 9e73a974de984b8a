"""The figures of a store: failures, and the seconds of finished and unfinished stores."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from densefeat import command_line, layout
from densefeat.index import read_index
from densefeat.layout import FeatureLayout
from densefeat.page import create_app
from densefeat.page.figures import RecordedShards
from densefeat.page.listing import without_features
from densefeat.storage.objects import Objects
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
    client = TestClient(create_app(store.uri), base_url="http://127.0.0.1:8000")
    found = client.get("/api/figures").json()
    assert (found["seconds"], found["shards"], found["timed_images"]) == (None, 0, 0)
    records = [write_timed_shard(store, 0), write_timed_shard(store, 1)]
    found = client.get("/api/figures").json()
    assert found["seconds"] == {"backbone": 4.0, "read": 1.75, "write": 0.5}
    assert list(found["seconds"]) == ["backbone", "read", "write"]
    assert (found["shards"], found["unread_shards"], found["timed_images"]) == (2, 0, 7)
    assert found["devices"] == {"cuda 0": 1, "cuda 1": 1}
    finish(Objects(store.uri), [*records, write_timed_shard(store, 2)])
    ended = TestClient(create_app(store.uri), base_url="http://127.0.0.1:8000").get("/api/figures").json()
    assert ended["seconds"] == {"backbone": 6.0, "read": 1.75, "write": 0.5}
    assert (ended["shards"], ended["timed_images"]) == (3, ROWS - 2)
    assert RecordedShards(Objects(store.uri)).figures(FEATURES) == {name: ended[name] for name in (
        "seconds", "timed_images", "shards", "unread_shards", "devices", "clipped")}  # fmt: skip


def test_records_are_read_once_and_damaged_ones_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = set_up_store(str(tmp_path / "store"))
    for shard in range(3):
        write_timed_shard(store, shard)
    recorded = RecordedShards(Objects(store.uri))
    place = tmp_path / "store" / layout.ledger_key(1)
    good = place.read_bytes()
    place.write_bytes(good[: len(good) // 2])
    with caplog.at_level(logging.WARNING):
        assert recorded.figures(FEATURES)["shards"] == 2
    assert "shard 1 is damaged" in caplog.text
    (tmp_path / "store" / layout.ledger_key(2)).write_bytes(b"not read again")
    place.write_bytes(good)
    assert recorded.figures(FEATURES)["seconds"] == {"backbone": 6.0, "read": 1.75, "write": 0.5}
    place.unlink()  # by a repair
    assert recorded.figures(FEATURES)["seconds"] == SECONDS[0]


def test_many_records_are_read_bit_by_bit(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    record = write_timed_shard(store, 0)
    objects, features = Objects(store.uri), replace(FEATURES, rows=100 * SHARD_ROWS)
    for shard in range(100):
        objects.put(layout.ledger_key(shard), replace(record, shard=shard).to_bytes())
    recorded = RecordedShards(objects)
    found = [recorded.figures(features, budget_s=0) for _ in range(4)]
    assert [(one["shards"], one["unread_shards"]) for one in found] == [(32, 68), (64, 36), (96, 4), (100, 0)]
    assert found[-1]["seconds"] == {"backbone": 400.0, "read": 150.0}


def test_failures_are_counted_once_for_page_and_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(str(tmp_path / "store"))
    statuses = ["ok", "corrupt", "corrupt", "too_small", "ok", "corrupt", "pending", "ok", "pending", "ok", "ok"]
    errors = [None, "cut", "no header", "2 pixels", None, "no header", None, None, None, None, None]
    replace_columns(store.uri, status=statuses, error=errors)
    index = read_index(Objects(store.uri), FEATURES)
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
