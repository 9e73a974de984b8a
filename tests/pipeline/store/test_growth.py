"""Rows appended to a store, without a backbone: what readers see, whoever is killed where."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from densefeat import FeatureStore, MissingFeatures, StoreError, layout
from densefeat.conformance import problems
from densefeat.page.library import Ledger
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.images.listing.source import keys_digest
from pipeline.reporting.seconds import StageSeconds
from pipeline.store.grown_shard import KeptRows, decision, done_or_kept
from pipeline.store.growth import Growth, begun_growth, complete_growth, grow
from pipeline.store.layout import delete_store, finish, foreign_keys
from pipeline.store.repair import rebuild_tables, withdraw
from pipeline.store.shard import finished_shards, read_record, write_shard
from pipeline.store.verify import StoreCheck
from schemas.attributes import AppendedSource
from schemas.index import OK
from schemas.ledger import LedgerRecord, RowOutcome
from tests.helpers.killing import run_killed
from tests.helpers.stores import (
    FAILED_ROWS,
    ROWS,
    SHARD_ROWS,
    H,
    K,
    KnownStore,
    W,
    known_codes,
    make_store,
    references,
    set_up_store,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NEW = 4  # rows, so that the last shard is filled, and one more begun
LAST = ROWS // SHARD_ROWS  # the shard that had fewer rows
D = 6  # of the embeddings
GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]
# The claim, the manifest, the index, the metadata of the features, the block, the root, the claim's deletion.
GROWTH_OPERATIONS = 7
# The decision, two companions, the features, the record, the decision's deletion.
SHARD_OPERATIONS = 6


def growth(rows: int = ROWS, new: int = NEW, images: str = "/more") -> Growth:
    """Rows for a store of ``rows`` rows that were appended to one of `ROWS`."""
    keys = references(rows + new)
    appended = [("/more", ROWS, rows)] * (rows > ROWS) + [(images, rows, rows + new)]
    sources = [
        AppendedSource(images, end - start, keys_digest(keys.slice(start, end - start)))
        for images, start, end in appended
    ]
    return Growth(rows, keys, ("a", "b", "c", "d"), tuple(sources))


def make_new_rows(known: KnownStore, shard: int, rows: int, seed: int = 5, embedded: bool = False) -> LedgerRecord:
    """What a worker does for a shard of ``rows`` rows, with random codes and companions."""
    objects = Objects(known.uri)
    kept = done_or_kept(objects, shard, known.configuration_hash, rows, SHARD_ROWS)
    if isinstance(kept, LedgerRecord):
        return kept
    first = shard * SHARD_ROWS
    codes = known_codes(rows=64, seed=seed)
    outcomes = [
        RowOutcome(row, OK, None, 2 * H, 2 * W, (0.5, 0, -2, 0, 0.5, -1), (0, 0, H, W))
        for row in range(first + len(kept), first + rows)
    ]
    chunks: list[bytes | None] = [layout.encode_chunk(codes[outcome.row]) for outcome in outcomes]
    companions = {}
    if embedded:
        images = [layout.with_crc(bytes([seed, outcome.row])) for outcome in outcomes]
        companions[layout.GUIDANCE] = kept.guidance_object(images, SHARD_ROWS)
        vectors = np.arange(D * len(outcomes)).reshape(-1, D) + 100 * seed
        companions[layout.EMBEDDING] = kept.embedding_object([vectors.astype(np.float16)], SHARD_ROWS)
    facts = {"configuration_hash": known.configuration_hash, "clipped": 1, "made_by": {"host": "later"}}
    return kept.write(objects, shard, SHARD_ROWS, chunks, outcomes, StageSeconds(), facts, companions)


def finished(known: KnownStore, rows: int, seed: int = 5) -> None:
    """Make what is missing of a store of ``rows`` rows, and finish it."""
    objects, shards = Objects(known.uri), -(-rows // SHARD_ROWS)
    done = finished_shards(objects, known.configuration_hash)
    for shard in set(range(shards)) - done.keys():
        done[shard] = make_new_rows(known, shard, min(SHARD_ROWS, rows - shard * SHARD_ROWS), seed)
    finish(objects, list(done.values()))


def check_old_rows(known: KnownStore, store: FeatureStore) -> None:
    for row in GOOD_ROWS:
        assert np.array_equal(store.read_codes(row), known.codes[row])
    for row in FAILED_ROWS:
        with pytest.raises(MissingFeatures, match="corrupt"):
            store.read(row)


def check_clean(known: KnownStore, rows: int) -> FeatureStore:
    """That nothing is wrong with a finished store of ``rows`` rows."""
    check = StoreCheck(known.uri)
    assert [check.shard(shard) for shard in check.recorded] == [[]] * check.layout.shards
    assert check.store() == []
    assert not check.partial
    assert not check.growing
    store = FeatureStore(known.uri)
    assert len(store) == rows
    assert problems(store) == []
    check_old_rows(known, store)
    assert store.rows_with_features.tolist() == [row for row in range(rows) if row not in FAILED_ROWS]
    assert not Objects(known.uri).list(layout.GROWTH)
    assert not (Path(known.uri) / layout.GROWTH).exists()
    return store


@pytest.mark.parametrize("killed_before", range(GROWTH_OPERATIONS + 1))
def test_killed_before_any_operation_of_the_growth(tmp_path: Path, killed_before: int) -> None:
    known = make_store(str(tmp_path / "store"))
    objects, before = Objects(known.uri), FeatureStore(known.uri)
    assert run_killed(killed_before, lambda: grow(objects, growth())) is (killed_before < GROWTH_OPERATIONS)
    # Whoever opens it now has the old rows, and perhaps the new ones, pending; and so has who opened it before.
    store = FeatureStore(known.uri)
    check_old_rows(known, store)
    check_old_rows(known, before)
    assert len(before) == len(before.index) == ROWS
    assert len(store) == len(store.index) == (ROWS + NEW if killed_before > 5 else ROWS)
    assert store.index["status"].to_pylist()[ROWS:] == ["pending"] * (len(store) - ROWS)
    assert problems(store) == []
    check = StoreCheck(known.uri)
    assert [check.shard(shard) for shard in check.recorded] == [[]] * (LAST + 1)
    assert check.store() == []
    assert check.growing is (1 <= killed_before <= 5)
    # Nothing was claimed, or any job completes it.
    if killed_before == 0:
        assert begun_growth(objects) is None
        grow(objects, growth())
    complete_growth(objects)
    assert begun_growth(objects) is None
    assert len(FeatureStore(known.uri)) == ROWS + NEW
    finished(known, ROWS + NEW)
    store = check_clean(known, ROWS + NEW)
    assert store.class_names == ("a", "b", "c", "d")
    assert store.attributes["appended"] == [
        {"images": "/more", "rows": NEW, "keys_sha256": keys_digest(references(ROWS + NEW).slice(ROWS))}
    ]
    assert store.keys == references(ROWS + NEW)["key"].to_pylist()
    check_old_rows(known, before)


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
        return slow.write(objects, LAST, SHARD_ROWS, [None], outcomes, StageSeconds(), facts, companions)

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
        return write_shard(objects, LAST, SHARD_ROWS, chunks, outcomes, StageSeconds(), facts, companions)

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


@pytest.mark.parametrize("rows", [1, 5])
def test_growing_again_and_again(tmp_path: Path, rows: int) -> None:
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    opened = [FeatureStore(known.uri)]
    for turn in range(3):
        total = ROWS + rows * (turn + 1)
        step = replace(growth(total - rows, rows), class_names=("a", "b", "c"))
        before = opened[-1].attributes.get("appended", [])
        sources = tuple(AppendedSource(**one) for one in before)
        grow(objects, replace(step, appended=(*sources, step.appended[-1])))
        finished(known, total)
        opened.append(check_clean(known, total))
        assert len(opened[-1].attributes["appended"]) == turn + 1
    for turn, store in enumerate(opened):
        check_old_rows(known, store)
        assert len(store.index) == ROWS + rows * turn


def test_a_reader_from_before_that_reads_the_index_at_any_time(tmp_path: Path) -> None:
    """The layout is read when a store is opened, the index later: in a loader's worker, much later."""
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    ledger = Ledger(objects, FeatureStore(known.uri).layout, known.configuration_hash)
    readers = [FeatureStore(known.uri) for _ in range(3)]
    grow(objects, growth())
    check_old_rows(known, readers[0])
    assert ledger.read_on(60).index["status"].to_pylist() == readers[0].index["status"].to_pylist()
    make_new_rows(known, LAST, SHARD_ROWS)
    check_old_rows(known, readers[1])
    assert ledger.read_on(60).index["status"].to_pylist() == readers[0].index["status"].to_pylist()
    page = Ledger(objects, FeatureStore(known.uri).layout, known.configuration_hash).read_on(60)
    finished(known, ROWS + NEW)
    check_old_rows(known, readers[2])
    assert all(len(reader.index) == ROWS for reader in readers)
    assert page.read_on(60).index["status"].to_pylist() == FeatureStore(known.uri).index["status"].to_pylist()


def test_a_page_sees_a_shard_grow(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    grow(Objects(known.uri), growth())
    ledger = Ledger(Objects(known.uri), FeatureStore(known.uri).layout, known.configuration_hash).read_on(60)
    assert ledger.index["status"].to_pylist()[LAST * SHARD_ROWS :] == ["corrupt", *["ok"] * 2, *["pending"] * 4]
    make_new_rows(known, LAST, SHARD_ROWS)
    ledger = ledger.read_on(60)
    assert ledger.index["status"].to_pylist()[LAST * SHARD_ROWS :] == ["corrupt", *["ok"] * 3, *["pending"] * 3]


def test_only_a_finished_store_of_as_many_rows_grows(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    later = growth(images="/others")
    grow(objects, growth())
    for other in (growth(), growth(ROWS + NEW), later):
        before = {key: objects.get(key) for key in objects.list()}
        with pytest.raises(JobError, match="appended images in the meantime: run the same command again"):
            grow(objects, other)
        assert {key: objects.get(key) for key in objects.list()} == before
    finished(known, ROWS + NEW)
    assert run_killed(3, lambda: grow(objects, growth(ROWS + NEW)))
    with pytest.raises(JobError, match="began to append other images"):
        grow(objects, growth(ROWS + NEW, images="/others"))
    complete_growth(objects)
    assert FeatureStore(known.uri).attributes["appended"][-1]["images"] == "/more"


@pytest.mark.parametrize("killed_before", [2, 4, 6])
def test_repair_in_the_middle(tmp_path: Path, killed_before: int) -> None:
    """A damaged index: the rows that a job began to append are not lost."""
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    assert run_killed(killed_before, lambda: grow(objects, growth()))
    if killed_before < 6:
        objects.put(layout.INDEX, b"damaged")
        assert rebuild_tables(objects, []) is False
    finished(known, ROWS + NEW)
    check_clean(known, ROWS + NEW)


def test_a_damaged_claim_is_said(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    assert run_killed(3, lambda: grow(objects, growth()))
    objects.put(layout.growth_key(ROWS), b"PAR1")
    with pytest.raises(JobError, match=r"rows-000000011\.parquet is damaged"):
        complete_growth(objects)
    check_old_rows(known, FeatureStore(known.uri))


def changed_root(known: KnownStore, change: Callable[[Any], None]) -> None:
    path = Path(known.uri) / layout.ATTRIBUTES
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_other_numbers_of_rows_are_damage(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    metadata = "consolidated_metadata", "metadata", "features", "shape"

    def more(document: Any) -> None:
        for name in metadata[:-1]:
            document = document[name]
        document["shape"][0] += 1

    changed_root(known, more)
    with pytest.raises(StoreError, match=r"features/zarr\.json is damaged: its copy in zarr\.json differs"):
        FeatureStore(known.uri)
    grown = make_store(str(tmp_path / "grown"))
    grow(Objects(grown.uri), growth())
    finished(grown, ROWS + NEW)
    changed_root(grown, lambda document: document["attributes"]["densefeat"]["appended"][0].update(rows=3))
    assert problems(FeatureStore(grown.uri)) == ["the attribute appended says that the store has 14 rows: it has 15"]
    check = StoreCheck(grown.uri)
    assert check.tables() == ["the keys in the index do not match the attributes"]
    changed_root(grown, lambda document: document["attributes"]["densefeat"].update(appended=[{"images": 3}]))
    assert problems(FeatureStore(grown.uri)) == ["the attribute appended is damaged: [{'images': 3}]"]


def test_what_a_growth_leaves_belongs_to_the_store(tmp_path: Path) -> None:
    known = embedded_store(tmp_path)
    objects = Objects(known.uri)
    assert run_killed(2, lambda: make_new_rows(known, LAST, SHARD_ROWS, 7, embedded=True))
    objects.put(layout.growth_key(ROWS), growth().to_bytes())
    assert foreign_keys(objects) == []
    delete_store(objects)
    assert objects.list() == {}


def test_growths_are_what_they_were(tmp_path: Path) -> None:
    there = Growth.from_bytes(growth().to_bytes())
    assert there.references.equals(growth().references)
    assert replace(there, references=pa.table({})).__dict__ | {"references": 0} == growth().__dict__ | {"references": 0}
    assert encode_embeddings(np.zeros((1, K), np.float16), 2)
    with pytest.raises(ValueError, match="not rows to append"):
        Growth.from_bytes(b"")
