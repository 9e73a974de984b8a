"""Blocks of the ledger: read instead of its records, never against them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from densefeat import FeatureStore, layout
from densefeat.page.library import Ledger
from densefeat.storage.objects import Objects
from pipeline.store.blocks import BlockWriter
from pipeline.store.layout import delete_store, foreign_keys
from pipeline.store.repair import withdraw
from pipeline.store.shard import finished_shards
from pipeline.store.verify import StoreCheck
from schemas.ledger import LedgerRecord
from tests.helpers.stores import KnownStore, set_up_store, write_known_shard

SHARDS = 3


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownStore:
    """All shards done, in blocks of two, of which the second has one shard; the store is not finished."""
    monkeypatch.setattr(layout, "BLOCK_SHARDS", 2)
    store = set_up_store(str(tmp_path / "store"))
    store.records = [write_known_shard(store, shard) for shard in range(SHARDS)]
    write_blocks(store)
    return store


def write_blocks(known: KnownStore, records: list[LedgerRecord] | None = None) -> None:
    writer = BlockWriter(Objects(known.uri), SHARDS, [])
    for record in reversed(records or known.records):
        writer.add(record)


def blocks(known: KnownStore) -> list[str]:
    return sorted(Objects(known.uri).list(layout.LEDGER_BLOCKS))


def gets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are read from now on."""
    read: list[str] = []
    get = Objects.get
    monkeypatch.setattr(Objects, "get", lambda self, key: read.append(key) or get(self, key))
    return read


def test_they_are_read_instead_of_records(known: KnownStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(known) == ["_ledger/blocks/000000.parquet", "_ledger/blocks/000001.parquet"]
    read = gets(monkeypatch)
    found = finished_shards(Objects(known.uri), known.configuration_hash)
    assert [found[shard] for shard in range(SHARDS)] == known.records
    assert all(found[shard].outcomes.equals(known.records[shard].outcomes) for shard in range(SHARDS))
    index = FeatureStore(known.uri).index
    assert [key for key in read if key.startswith(layout.LEDGER)] == 2 * blocks(known)
    for key in blocks(known):
        Objects(known.uri).delete(key)
    assert index.equals(FeatureStore(known.uri).index)


def test_the_page_reads_them(known: KnownStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import densefeat.page.library

    monkeypatch.setattr(densefeat.page.library, "PARALLEL_REQUESTS", 1)
    read = gets(monkeypatch)
    store = FeatureStore(known.uri)
    ledger = Ledger(Objects(known.uri), store.layout, known.configuration_hash).read_on(0.0)
    assert ledger.unread == 0
    assert ledger.sums.figures()["shards"] == SHARDS
    assert [key for key in read if key.startswith(layout.LEDGER)] == blocks(known)
    assert ledger.index.equals(store.index)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b""])
def test_a_damaged_one_is_not_used(
    known: KnownStore, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    objects, expected = Objects(known.uri), FeatureStore(known.uri).index
    objects.put(blocks(known)[0], damage(objects.get(blocks(known)[0])))
    with caplog.at_level(logging.WARNING):
        found = finished_shards(objects, known.configuration_hash)
        assert FeatureStore(known.uri).index.equals(expected)
    assert [found[shard] for shard in range(SHARDS)] == known.records
    assert "_ledger/blocks/000000.parquet is damaged" in caplog.text
    assert any("blocks" in problem for problem in StoreCheck(known.uri).tables())


def test_nor_one_of_another_configuration(known: KnownStore, caplog: pytest.LogCaptureFixture) -> None:
    """A job that was not stopped before the store was replaced may write one."""
    for key in blocks(known):
        Objects(known.uri).delete(key)
    write_blocks(known, [replace(record, configuration_hash="f" * 64, nbytes=1) for record in known.records])
    found = finished_shards(Objects(known.uri), known.configuration_hash)
    assert [found[shard] for shard in range(SHARDS)] == known.records
    assert "it is of another configuration" in caplog.text


def test_a_shard_without_a_record_is_not_done(known: KnownStore) -> None:
    objects = Objects(known.uri)
    objects.delete(layout.ledger_key(1))
    assert finished_shards(objects, known.configuration_hash).keys() == {0, 2}
    statuses = FeatureStore(known.uri).index["status"].to_pylist()
    assert statuses[4:8] == ["pending"] * 4
    assert "pending" not in statuses[:4] + statuses[8:]


def test_a_withdrawn_shard_takes_its_block_along(known: KnownStore) -> None:
    objects = Objects(known.uri)
    withdraw(objects, 1)
    assert blocks(known) == ["_ledger/blocks/000001.parquet"]
    assert finished_shards(objects, known.configuration_hash).keys() == {0, 2}


def test_one_that_contradicts_a_record_is_reported(known: KnownStore) -> None:
    assert StoreCheck(known.uri).tables() == []
    objects = Objects(known.uri)
    for key in blocks(known):
        objects.delete(key)
    write_blocks(known, [replace(record, clipped=7) for record in known.records])
    assert StoreCheck(known.uri).tables() == ["the ledger's blocks and its records differ in shard 0"]


def test_an_incomplete_one_is_not_written(known: KnownStore) -> None:
    for key in blocks(known):
        Objects(known.uri).delete(key)
    write_blocks(known, [known.records[0], known.records[2]])
    assert blocks(known) == ["_ledger/blocks/000001.parquet"]
    BlockWriter(Objects(known.uri), SHARDS, known.records)
    assert len(blocks(known)) == 2


def test_small_stores_have_none(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    BlockWriter(Objects(store.uri), SHARDS, [write_known_shard(store, shard) for shard in range(SHARDS)])
    assert blocks(store) == []


def test_a_store_that_is_claimed_and_not_set_up_has_no_finished_shards(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    for key in list(Objects(known.uri).list()):
        if key != layout.ATTRIBUTES:
            Objects(known.uri).delete(key)
    assert finished_shards(Objects(known.uri), known.configuration_hash) == {}


def test_they_belong_to_the_store(known: KnownStore) -> None:
    objects = Objects(known.uri)
    assert foreign_keys(objects) == []
    delete_store(objects)
    assert objects.list() == {}


def test_records_of_a_written_block_are_equal_and_share_a_table(known: KnownStore) -> None:
    for key in blocks(known):
        Objects(known.uri).delete(key)
    writer = BlockWriter(Objects(known.uri), SHARDS, [])
    returned = [writer.add(record) for record in reversed(known.records)]
    assert [len(records) for records in returned] == [1, 0, 2]  # the second block has one shard
    for record in (record for records in returned for record in records):
        assert record == known.records[record.shard]
        assert record.outcomes.equals(known.records[record.shard].outcomes)
        assert record.to_bytes() == known.records[record.shard].to_bytes()
    first, second = (record.outcomes["row"].chunk(0).buffers()[1].address for record in returned[2])
    assert first == second
