"""The commit protocol: killed anywhere, raced by anybody, with other bytes or the same, a record is of its object."""

import hashlib
import random
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densefeat import FeatureStore, layout
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.layout import finish
from pipeline.store.repair import take_out
from pipeline.store.shard import NewShard, committed, finished_shards, read_record, write_shard
from pipeline.store.verify import StoreCheck
from schemas.ledger import LedgerRecord, RowOutcome
from tests.helpers.killing import FORK, run_killed
from tests.helpers.stores import (
    FAILED_ROWS,
    ROWS,
    SHARD_ROWS,
    KnownStore,
    known_codes,
    make_store,
    set_up_store,
    write_known_shard,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return set_up_store(str(tmp_path / "store"))


def on_other_hardware(known: KnownStore, seed: int) -> KnownStore:
    """The same configuration, other bytes."""
    return replace(known, codes=known_codes(seed=seed))


def is_consistent(known: KnownStore, shard: int) -> LedgerRecord | None:
    """Whether a shard's record is of its object; the record."""
    objects = Objects(known.uri)
    if not objects.exists(layout.ledger_key(shard)):
        return None
    record = read_record(objects, layout.ledger_key(shard))
    data = objects.get(layout.shard_key(shard))
    assert (len(data), hashlib.sha256(data).hexdigest()) == (record.nbytes, record.sha256)
    assert record.configuration_hash == known.configuration_hash
    return record


def is_whole(known: KnownStore, variants: list[KnownStore]) -> None:
    """Finish and compare: each shard is wholly of one of the variants, to the bit."""
    objects = Objects(known.uri)
    finish(objects, list(finished_shards(objects, known.configuration_hash).values()))
    check = StoreCheck(known.uri)
    assert check.store() == []
    assert [check.shard(shard) for shard in check.recorded] == [[], [], []]
    store = FeatureStore(known.uri)
    for shard in range(3):
        rows = [row for row in store.layout.rows_of(shard) if row not in FAILED_ROWS]
        got = [store.read_codes(row) for row in rows]
        assert any(np.array_equal(got, variant.codes[rows]) for variant in variants)
    assert store.index["status"].to_pylist() == ["corrupt" if row in FAILED_ROWS else "ok" for row in range(ROWS)]
    assert objects.list(layout.INTENTS) == {}
    assert not (Path(known.uri) / layout.INTENTS).exists()


# The operations: the intent, the object, the record, the intent's deletion.
OPERATIONS = 4


@pytest.mark.parametrize("survivor", ["same bytes", "other bytes"])
@pytest.mark.parametrize("killed_before", range(OPERATIONS + 1))
def test_killed_before_any_operation(known: KnownStore, killed_before: int, survivor: str) -> None:
    dead = on_other_hardware(known, 7)
    living = dead if survivor == "same bytes" else known
    killed = run_killed(killed_before, lambda: write_known_shard(dead, 0))
    assert killed is (killed_before < OPERATIONS)
    objects = Objects(known.uri)
    left = is_consistent(known, 0)
    assert (left is not None) is (killed_before > 2)
    assert objects.exists(layout.shard_key(0)) is (killed_before > 1)
    record = write_known_shard(living, 0)
    assert is_consistent(known, 0) == record
    assert read_record(objects, layout.ledger_key(0)) == record
    for shard in (1, 2):
        write_known_shard(living, shard)
    is_whole(known, [known, dead])
    expected = dead if killed_before > 1 else living  # whose object was first
    assert np.array_equal(FeatureStore(known.uri).read_codes(0), expected.codes[0])


@pytest.mark.s3
@pytest.mark.parametrize("killed_before", [2, 3])
def test_killed_between_object_and_record_on_s3(s3_bucket: str, killed_before: int) -> None:
    known = set_up_store(f"{s3_bucket}/store")
    dead = on_other_hardware(known, 7)
    assert run_killed(killed_before, lambda: write_known_shard(dead, 0))
    record = write_known_shard(known, 0)
    assert is_consistent(known, 0) == record
    assert Objects(known.uri).list(layout.INTENTS) == {} or killed_before == 3
    assert np.array_equal(FeatureStore(known.uri).read_codes(0), dead.codes[0])


def write_all(known: KnownStore, barrier: Barrier, results: Any) -> None:
    for shard in range(3):
        barrier.wait(60)
        results.put((shard, write_known_shard(known, shard).sha256))


@pytest.mark.parametrize("turn", range(5))
def test_racing_writers_agree(known: KnownStore, turn: int) -> None:
    variants = [on_other_hardware(known, seed) for seed in (7, 7, 8, 9)]
    barrier, results = FORK.Barrier(len(variants)), FORK.Queue()
    children = [FORK.Process(target=write_all, args=(variant, barrier, results)) for variant in variants]
    for child in children:
        child.start()
    told = [results.get(timeout=60) for _ in range(3 * len(variants))]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    for shard in range(3):
        record = is_consistent(known, shard)
        assert record is not None
        assert {sha256 for number, sha256 in told if number == shard} == {record.sha256}
    is_whole(known, variants)


def write_and_die(known: KnownStore, number: int, barrier: Barrier) -> None:
    barrier.wait(60)
    run_killed(number, lambda: write_known_shard(known, 0))


@pytest.mark.parametrize("seed", range(5))
def test_racing_and_dying_writers_leave_no_damage(known: KnownStore, seed: int) -> None:
    draw = random.Random(seed)
    variants = [on_other_hardware(known, 7 + i) for i in range(3)]
    for _ in range(3):
        barrier = FORK.Barrier(len(variants))
        children = [
            FORK.Process(target=write_and_die, args=(variant, draw.randint(0, OPERATIONS), barrier))
            for variant in variants
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        is_consistent(known, 0)
    for shard in range(3):
        write_known_shard(known, shard)
    is_whole(known, [known, *variants])


def test_what_another_job_committed_is_adopted(known: KnownStore, caplog: pytest.LogCaptureFixture) -> None:
    objects, other = Objects(known.uri), on_other_hardware(known, 7)
    first = write_known_shard(other, 0)
    path = Path(known.uri) / layout.shard_key(0)
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    assert write_known_shard(known, 0) == first
    assert "another job" in caplog.text
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert committed(objects, 0, known.configuration_hash, SHARD_ROWS) == first
    assert committed(objects, 1, known.configuration_hash, SHARD_ROWS) is None


def test_a_lost_object_is_put_again_if_its_bytes_come_out(known: KnownStore) -> None:
    objects, other = Objects(known.uri), on_other_hardware(known, 7)
    for shard in range(3):
        write_known_shard(known, shard)
    key = layout.shard_key(1)
    whole = objects.get(key)
    for damage in (lambda: objects.delete(key), lambda: objects.put(key, whole[:-5]), lambda: objects.put(key, b"")):
        damage()
        assert sorted(finished_shards(objects, known.configuration_hash)) == [0, 2]
        with pytest.raises(JobError, match=r"was lost or truncated.*verify_store.py --repair"):
            write_known_shard(other, 1)
        write_known_shard(known, 1)
        assert objects.get(key) == whole
    objects.delete(key)
    take_out(objects, [1])
    write_known_shard(other, 1)
    is_whole(known, [known, other])


def test_a_finished_shard_is_nobodys_to_delete(tmp_path: Path) -> None:
    """Neither a damaged record nor one of another configuration: people decide, by --repair."""
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    before = objects.list()
    assert sorted(finished_shards(objects, known.configuration_hash)) == [0, 1, 2]
    with pytest.raises(JobError, match="shard 0 is in the ledger, made with another configuration"):
        finished_shards(objects, "f" * 64)
    assert objects.list() == before
    objects.put(layout.ledger_key(1), b"PAR1 not a record PAR1")
    with pytest.raises(JobError, match=r"record of shard 1 is damaged.*--repair"):
        finished_shards(objects, known.configuration_hash)
    with pytest.raises(JobError, match=r"record of shard 1 is damaged.*--repair"):
        write_known_shard(known, 1)
    assert objects.list().keys() == before.keys()
    take_out(objects, [1])
    assert sorted(finished_shards(objects, known.configuration_hash)) == [0, 2]
    write_known_shard(known, 1)
    is_whole(known, [known])


def test_an_object_that_nobody_announced_is_left_alone(known: KnownStore) -> None:
    objects, key = Objects(known.uri), layout.shard_key(0)
    objects.put(key, b"of an unknown job")
    with pytest.raises(JobError, match=rf"{key} exists.*delete it"):
        write_known_shard(known, 0)
    assert objects.get(key) == b"of an unknown job"
    assert is_consistent(known, 0) is None
    objects.delete(key)
    write_known_shard(known, 0)
    # Of another store, which was here before.
    other = replace(on_other_hardware(known, 7), configuration_hash="f" * 64)
    data = objects.get(key)
    sha256 = hashlib.sha256(data).hexdigest()
    record = replace(read_record(objects, layout.ledger_key(0)), configuration_hash=other.configuration_hash)
    objects.put(layout.intent_key(0, sha256), record.to_bytes())
    objects.delete(layout.ledger_key(0))
    with pytest.raises(JobError, match=rf"{key} was made with another configuration"):
        write_known_shard(on_other_hardware(known, 8), 0)
    assert objects.get(key) == data


def test_a_job_whose_store_was_replaced_writes_nothing(known: KnownStore) -> None:
    objects = Objects(known.uri)
    before = objects.list()
    with pytest.raises(JobError, match="is now another store"):
        write_known_shard(replace(known, configuration_hash="f" * 64), 0)
    objects.delete(layout.ATTRIBUTES)
    with pytest.raises(JobError, match="has deleted the store"):
        write_known_shard(known, 0)
    assert objects.list().keys() == before.keys() - {layout.ATTRIBUTES}


def test_a_shard_without_features_is_committed_too(known: KnownStore) -> None:
    outcomes = [RowOutcome(row, "corrupt", "cut off") for row in range(SHARD_ROWS)]
    facts = {"configuration_hash": known.configuration_hash, "clipped": 0, "made_by": {"host": "test"}}
    record = write_shard(Objects(known.uri), NewShard(0, SHARD_ROWS, [None] * 4, outcomes, facts))
    assert (record.rows_ok, record.rows_failed) == (0, 4)
    assert is_consistent(known, 0) == record
