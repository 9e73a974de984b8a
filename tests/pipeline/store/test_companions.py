"""Shards of several objects: whoever is killed or refused where, the record describes the objects that exist."""

import hashlib
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from densefeat import layout
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.repair import withdraw
from pipeline.store.shard import NewShard, committed, finished_shards, read_record, write_shard
from pipeline.store.verify import StoreCheck
from schemas.ledger import LedgerRecord
from tests.helpers.killing import FORK, run_killed
from tests.helpers.stores import SHARD_ROWS, KnownStore, known_codes, outcome, set_up_store

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# The operations: the intent, two companions, the features, the record, the intent's deletion.
OPERATIONS = 6


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return set_up_store(str(tmp_path / "store"))


def write(known: KnownStore, companions: dict[str, bytes], shard: int = 0) -> LedgerRecord:
    outcomes = [outcome(row) for row in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)]
    chunks = [layout.encode_chunk(known.codes[o.row]) if o.ok else None for o in outcomes]
    facts = {"configuration_hash": known.configuration_hash, "clipped": 0, "made_by": {"host": "test"}}
    return write_shard(Objects(known.uri), NewShard(shard, SHARD_ROWS, chunks, outcomes, facts, companions=companions))


def of(name: str) -> dict[str, bytes]:
    """Companions of a writer."""
    return {layout.GUIDANCE: f"guidance of {name}".encode(), layout.EMBEDDING: f"the embedding of {name}".encode()}


def check(known: KnownStore, shard: int = 0) -> LedgerRecord:
    """That the record of a shard is of its objects; the record."""
    objects = Objects(known.uri)
    record = read_record(objects, layout.ledger_key(shard))
    assert record.objects.keys() == {layout.FEATURES, layout.GUIDANCE, layout.EMBEDDING}
    for array, facts in record.objects.items():
        data = objects.get(layout.shard_key(shard, array))
        assert facts == {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert record.total_nbytes == sum(facts["nbytes"] for facts in record.objects.values())
    assert StoreCheck(known.uri).shard(shard) == []
    return record


@pytest.mark.parametrize("survivor", ["same bytes", "other bytes"])
@pytest.mark.parametrize("killed_before", range(OPERATIONS + 1))
def test_killed_before_any_operation(known: KnownStore, killed_before: int, survivor: str) -> None:
    dead = replace(known, codes=known_codes(seed=7))
    living, own = (dead, of("dead")) if survivor == "same bytes" else (known, of("living"))
    assert run_killed(killed_before, lambda: write(dead, of("dead"))) is (killed_before < OPERATIONS)
    record = write(living, own)
    assert check(known) == record
    for array, created_by in ((layout.GUIDANCE, 1), (layout.EMBEDDING, 2)):
        expected = of("dead") if killed_before > created_by else own
        assert Objects(known.uri).get(layout.shard_key(0, array)) == expected[array]
    assert committed(Objects(known.uri), 0, known.configuration_hash, SHARD_ROWS) == record


@pytest.mark.s3
@pytest.mark.parametrize("killed_before", [2, 3, 4])
def test_killed_on_s3(s3_bucket: str, killed_before: int) -> None:
    known = set_up_store(f"{s3_bucket}/store")
    dead = replace(known, codes=known_codes(seed=7))
    assert run_killed(killed_before, lambda: write(dead, of("dead")))
    assert write(known, of("living")) == check(known)


def race(known: KnownStore, name: str, barrier: Barrier, results: Any) -> None:
    barrier.wait(60)
    results.put(write(known, of(name)).objects)


@pytest.mark.parametrize("turn", range(4))
def test_racing_writers_agree(known: KnownStore, turn: int) -> None:
    barrier, results = FORK.Barrier(3), FORK.Queue()
    writers = [
        FORK.Process(
            target=race, args=(replace(known, codes=known_codes(seed=10 * turn + i)), f"{i}", barrier, results)
        )
        for i in range(3)
    ]
    for writer in writers:
        writer.start()
    got = [results.get(timeout=120) for _ in writers]
    for writer in writers:
        writer.join(60)
    assert got == [check(known).objects] * 3


def test_an_object_of_nobody_is_not_adopted(known: KnownStore) -> None:
    objects, key = Objects(known.uri), layout.shard_key(0, layout.GUIDANCE)
    objects.put(key, b"of nobody")
    with pytest.raises(JobError, match=r"guidance/c/0/0/0/0 exists, its bytes differ .* no record describes it"):
        write(known, of("living"))
    assert not objects.exists(layout.shard_key(0))
    assert not objects.exists(layout.ledger_key(0))
    objects.delete(key)
    assert write(known, of("living")) == check(known)


def test_nor_one_of_another_configuration(known: KnownStore) -> None:
    other = replace(known, codes=known_codes(seed=7))
    assert run_killed(3, lambda: write(other, of("other")))  # after its companions
    objects = Objects(known.uri)
    (intent,) = objects.list(layout.INTENTS)
    foreign = replace(read_record(objects, intent), configuration_hash="f" * 64)
    objects.put(intent, foreign.to_bytes())
    with pytest.raises(JobError, match="no record describes it"):
        write(known, of("living"))


@pytest.mark.parametrize("array", [layout.FEATURES, layout.GUIDANCE, layout.EMBEDDING])
@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_lost_object_is_written_again_by_whoever_has_the_same_bytes(
    known: KnownStore, array: str, damage: str
) -> None:
    record = write(known, of("living"))
    objects, key = Objects(known.uri), layout.shard_key(0, array)
    data = objects.get(key)
    objects.delete(key) if damage == "lost" else objects.put(key, data[:-1])
    assert finished_shards(objects, known.configuration_hash) == {}
    assert committed(objects, 0, known.configuration_hash, SHARD_ROWS) is None
    with pytest.raises(JobError, match=f"the object {key} was lost or truncated"):
        write(replace(known, codes=known_codes(seed=7)), of("other"))
    assert write(known, of("living")) == record == check(known)
    assert objects.get(key) == data


def test_what_is_withdrawn_is_gone(known: KnownStore) -> None:
    write(known, of("living"))
    objects = Objects(known.uri)
    withdraw(objects, 0)
    assert not any(objects.list(f"{array}/c") for array in (layout.FEATURES, layout.GUIDANCE, layout.EMBEDDING))
    assert write(known, of("later")) == check(known)
