"""Rows added to the last shard of a store: the old ones stay, whoever is killed where."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from densefeat import FeatureStore, layout
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.appending.grown_shard import KeptRows, decision, done_or_kept
from pipeline.store.appending.growth import grow
from pipeline.store.layout import delete_store, finish, foreign_keys
from pipeline.store.repair import withdraw
from pipeline.store.shard import NewShard, finished_shards, read_record, write_shard
from pipeline.store.verify import StoreCheck
from schemas.ledger import LedgerRecord, RowOutcome
from tests.helpers.killing import run_killed
from tests.helpers.stores import (
    LAST,
    NEW,
    ROWS,
    SHARD_ROWS,
    D,
    KnownStore,
    growth,
    known_codes,
    make_new_rows,
    set_up_store,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# The decision, two companions, the features, the record, the decision's deletion.
SHARD_OPERATIONS = 6


def embedded_store(tmp_path: Path) -> KnownStore:
    """A store whose shards have companions, to which rows were appended; none of these is made."""
    known = set_up_store(str(tmp_path / "store"))
    known.codes = known_codes(rows=64, seed=3)
    for shard in range(LAST + 1):
        make_new_rows(known, shard, min(SHARD_ROWS, ROWS - shard * SHARD_ROWS), seed=3, embedded=True)
    finish(Objects(known.uri), list(finished_shards(Objects(known.uri), known.configuration_hash).values()))
    grow(Objects(known.uri), growth())
    return known


def check_shard(known: KnownStore, before: dict[str, bytes]) -> LedgerRecord:
    """That the record of the last shard is of its objects, and that the old rows are where they were."""
    objects = Objects(known.uri)
    record = read_record(objects, layout.ledger_key(LAST))
    assert record.rows == SHARD_ROWS
    for array, facts in record.objects.items():
        data = objects.get(layout.shard_key(LAST, array))
        assert facts == {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    old = ROWS - LAST * SHARD_ROWS
    for array, first in ((layout.FEATURES, False), (layout.GUIDANCE, True)):
        data, index = objects.get(layout.shard_key(LAST, array)), layout.shard_index_nbytes(SHARD_ROWS)
        places = layout.unpack_shard_index(data, SHARD_ROWS, index_first=first)
        assert places[:old] == layout.unpack_shard_index(before[array], SHARD_ROWS, index_first=first)[:old]
        assert None not in places
        body = slice(index, None) if first else slice(0, -index)
        assert data[body].startswith(before[array][body])
    vectors = [
        layout.decode_values(data, "float16", (SHARD_ROWS, D))
        for data in (before[layout.EMBEDDING], objects.get(layout.shard_key(LAST, layout.EMBEDDING)))
    ]
    assert np.array_equal(vectors[0][:old], vectors[1][:old])
    assert np.isnan(vectors[0][old:]).all()
    assert np.isfinite(vectors[1]).all()
    return record


@pytest.mark.parametrize("killed_before", range(SHARD_OPERATIONS + 1))
def test_killed_before_any_operation_of_a_shard(tmp_path: Path, killed_before: int) -> None:
    known = embedded_store(tmp_path)
    objects = Objects(known.uri)
    arrays = (layout.FEATURES, layout.GUIDANCE, layout.EMBEDDING)
    before = {array: objects.get(layout.shard_key(LAST, array)) for array in arrays}
    opened = FeatureStore(known.uri)
    places = opened.index.select(["chunk_offset", "chunk_nbytes"]).slice(0, ROWS)

    def work(seed: int) -> LedgerRecord:
        return make_new_rows(known, LAST, SHARD_ROWS, seed, embedded=True)

    assert run_killed(killed_before, lambda: work(7)) is (killed_before < SHARD_OPERATIONS)
    # Readers have the old rows, whichever object is there; and verification finds nothing, so that repair takes none.
    for store in (opened, FeatureStore(known.uri), pickle.loads(pickle.dumps(opened))):
        for row in range(ROWS):
            assert np.array_equal(store.read_codes(row), known.codes[row])
        assert store.index.select(["chunk_offset", "chunk_nbytes"]).slice(0, ROWS).equals(places)
    for fast in (False, True):
        check = StoreCheck(known.uri, fast=fast)
        assert check.shard(LAST) == []
        assert check.partial == ({LAST} if killed_before <= 4 else set())
    # The next worker has other bytes for the new rows. What the dead one decided is kept.
    record = work(8)
    assert check_shard(known, before) == record
    assert work(9) == record
    expected = known_codes(rows=64, seed=8 if killed_before == 0 else 7)
    store = FeatureStore(known.uri)
    assert np.array_equal(store.read_codes(ROWS), expected[ROWS])
    assert record.clipped == 2
    assert StoreCheck(known.uri).shard(LAST) == []
    make_new_rows(known, LAST + 1, ROWS + NEW - SHARD_ROWS * (LAST + 1), embedded=True)
    finish(objects, list(finished_shards(objects, known.configuration_hash).values()))
    assert StoreCheck(known.uri).store() == []


def test_a_decision_of_another_worker_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two workers compute the new rows; the slower one finds the decision, or that all is done."""
    known = embedded_store(tmp_path)
    objects, key = Objects(known.uri), layout.grown_shard_key(LAST, SHARD_ROWS)
    assert run_killed(1, lambda: make_new_rows(known, LAST, SHARD_ROWS, 7, embedded=True))
    decided = objects.get(key)
    objects.delete(key)
    slow = done_or_kept(objects, LAST, known.configuration_hash, SHARD_ROWS, SHARD_ROWS)
    assert isinstance(slow, KeptRows)
    assert len(slow) == ROWS - LAST * SHARD_ROWS
    objects.create(key, decided)

    def write() -> LedgerRecord:
        outcomes = [RowOutcome(ROWS, "corrupt", "cut off")]
        facts = {"configuration_hash": known.configuration_hash, "clipped": 0, "made_by": {"host": "slow"}}
        companions = dict.fromkeys(layout.COMPANIONS, b"of the slow one")
        return slow.write(objects, NewShard(LAST, SHARD_ROWS, [None], outcomes, facts, companions=companions))

    record = write()
    assert "another worker decided" in caplog.text
    assert record.rows_ok == SHARD_ROWS
    objects_now = objects.list()
    assert write() == record  # after the commit
    assert objects.list() == objects_now
    objects.create(key, decided)  # created too late, by a worker that was killed then
    assert write() == record
    assert StoreCheck(known.uri).shard(LAST) == []
    make_new_rows(known, LAST + 1, ROWS + NEW - SHARD_ROWS * (LAST + 1), embedded=True)
    finish(objects, list(finished_shards(objects, known.configuration_hash).values()))
    assert objects.list(layout.GROWTH) == {}


def test_a_damaged_decision_is_not_carried_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = embedded_store(tmp_path)
    objects, key = Objects(known.uri), layout.grown_shard_key(LAST, SHARD_ROWS)
    assert run_killed(3, lambda: make_new_rows(known, LAST, SHARD_ROWS, 7, embedded=True))
    data = objects.get(key)
    objects.put(key, data[: len(data) // 2])
    with pytest.raises(ValueError, match="BadZipFile"):
        decision(objects, LAST, SHARD_ROWS)
    assert make_new_rows(known, LAST, SHARD_ROWS, 8, embedded=True).rows == SHARD_ROWS
    assert "is damaged" in caplog.text
    assert np.array_equal(FeatureStore(known.uri).read_codes(ROWS), known_codes(rows=64, seed=8)[ROWS])


def test_a_worker_of_an_earlier_run_damages_nothing(tmp_path: Path) -> None:
    """It comes back when the store has grown, and writes the last shard with the rows that it knows."""
    known = embedded_store(tmp_path)
    objects = Objects(known.uri)
    old = read_record(objects, layout.ledger_key(LAST))
    data = {array: objects.get(layout.shard_key(LAST, array)) for array in old.objects}
    outcomes = [RowOutcome(**one) for one in old.outcomes.to_pylist()]
    places = [(one.chunk_offset or 0, one.chunk_nbytes or 0) for one in outcomes]
    chunks = [data[layout.FEATURES][at : at + nbytes] for at, nbytes in places]
    companions = {array: data[array] for array in layout.COMPANIONS}
    facts = {"configuration_hash": known.configuration_hash, "clipped": 1, "made_by": {"host": "zombie"}}

    def come_back() -> LedgerRecord:
        return write_shard(objects, NewShard(LAST, SHARD_ROWS, chunks, outcomes, facts, companions=companions))

    assert come_back() == old
    assert run_killed(4, lambda: make_new_rows(known, LAST, SHARD_ROWS, 7, embedded=True))  # objects, no record
    replaced = objects.get(layout.shard_key(LAST))
    assert replaced != data[layout.FEATURES]
    with pytest.raises(JobError, match=r"rows were appended to shard 2 since this job began"):
        come_back()
    assert objects.get(layout.shard_key(LAST)) == replaced
    record = make_new_rows(known, LAST, SHARD_ROWS, 8, embedded=True)
    assert come_back() == record == read_record(objects, layout.ledger_key(LAST))
    assert StoreCheck(known.uri).shard(LAST) == []


@pytest.mark.parametrize("array", [layout.FEATURES, layout.GUIDANCE, layout.EMBEDDING])
@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_nothing_is_added_to_damaged_rows(tmp_path: Path, array: str, damage: str) -> None:
    known = embedded_store(tmp_path)
    objects, key = Objects(known.uri), layout.shard_key(LAST, array)
    data = bytearray(objects.get(key))
    data[len(data) // 2 if array != layout.GUIDANCE else -1] ^= 1
    objects.delete(key) if damage == "lost" else objects.put(key, bytes(data))
    with pytest.raises(JobError, match=rf"{key} is (missing|damaged).*--repair"):
        make_new_rows(known, LAST, SHARD_ROWS, embedded=True)
    assert StoreCheck(known.uri).shard(LAST) != []
    withdraw(objects, LAST)  # what --repair does
    assert make_new_rows(known, LAST, SHARD_ROWS, embedded=True).rows == SHARD_ROWS


def test_what_a_growth_leaves_belongs_to_the_store(tmp_path: Path) -> None:
    known = embedded_store(tmp_path)
    objects = Objects(known.uri)
    assert run_killed(2, lambda: make_new_rows(known, LAST, SHARD_ROWS, 7, embedded=True))
    objects.put(layout.growth_key(ROWS), growth().to_bytes())
    assert foreign_keys(objects) == []
    delete_store(objects)
    assert objects.list() == {}
