"""Rows appended to a store, without a backbone: what readers see, whoever is killed where."""

import json
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
from pipeline.store.appending.growth import Growth, begun_growth, complete_growth, grow
from pipeline.store.blocks import BlockWriter
from pipeline.store.layout import finish
from pipeline.store.repair import rebuild_tables
from pipeline.store.shard import finished_shards
from pipeline.store.verify import StoreCheck
from schemas.attributes import AppendedSource
from tests.helpers.killing import run_killed
from tests.helpers.stores import (
    FAILED_ROWS,
    LAST,
    NEW,
    ROWS,
    SHARD_ROWS,
    K,
    KnownStore,
    finished,
    growth,
    make_new_rows,
    make_store,
    references,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]
# The claim, the manifest, the index, the metadata of the features, the block, the root, the claim's deletion.
GROWTH_OPERATIONS = 7


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


def test_growths_are_what_they_were(tmp_path: Path) -> None:
    there = Growth.from_bytes(growth().to_bytes())
    assert there.references.equals(growth().references)
    assert replace(there, references=pa.table({})).__dict__ | {"references": 0} == growth().__dict__ | {"references": 0}
    assert encode_embeddings(np.zeros((1, K), np.float16), 2)
    with pytest.raises(ValueError, match="not rows to append"):
        Growth.from_bytes(b"")


def test_blocks_of_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A block with the last shard is written anew, and nobody uses one from before."""
    monkeypatch.setattr(layout, "BLOCK_SHARDS", 2)
    known = make_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    BlockWriter(objects, 3, known.records)
    assert len(objects.list(layout.LEDGER_BLOCKS)) == 2
    old = objects.get(layout.ledger_block_key(1))
    before = FeatureStore(known.uri)
    grow(objects, growth())
    assert objects.list(layout.LEDGER_BLOCKS).keys() == {layout.ledger_block_key(0)}
    check_old_rows(known, FeatureStore(known.uri))
    objects.put(layout.ledger_block_key(1), old)  # by a job that was stopped
    check_old_rows(known, FeatureStore(known.uri))
    objects.delete(layout.ledger_block_key(1))
    for shard, rows in ((2, 4), (3, 3)):
        make_new_rows(known, shard, rows)
    records = finished_shards(objects, known.configuration_hash)
    BlockWriter(objects, 4, records.values())
    assert len(objects.list(layout.LEDGER_BLOCKS)) == 2
    check_old_rows(known, before)
    assert finished_shards(objects, known.configuration_hash) == records
    finish(objects, list(records.values()))
    check_clean(known, ROWS + NEW)
    assert not caplog.records


def test_a_store_of_an_early_version_does_not_grow(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    changed_root(known, lambda document: document.pop("consolidated_metadata"))
    with pytest.raises(JobError, match="an early version of densefeat made cannot grow"):
        grow(Objects(known.uri), growth())
    assert begun_growth(Objects(known.uri)) is None
