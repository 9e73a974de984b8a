"""A store that is damaged, document by document: an error that names what is damaged, or the values as they were."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from densefeat import FeatureStore, MissingFeatures, StoreError, TorchFeatures, layout
from densefeat.storage.parquet import parquet_bytes, read_parquet
from tests.helpers.stores import FAILED_ROWS, ROWS, SHARD_ROWS, KnownStore, make_store, set_up_store, write_known_shard

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return make_store(str(tmp_path / "store"))


def read_all(uri: str) -> dict[int, np.ndarray]:
    store = FeatureStore(uri)
    return {row: store.read(row) for row in GOOD_ROWS}


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", ["zarr.json", "features/zarr.json", "step/zarr.json", "index.parquet", "step/c/0"])
def test_a_document_cut_off_anywhere_is_an_error(known: KnownStore, name: str) -> None:
    path = Path(known.uri) / name
    data = path.read_bytes()
    end = len(data.rstrip())
    for size in {0, 1, *range(2, end, max(1, end // 25)), end - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(StoreError, match=f"{name.split('/')[0]}.*(damaged|missing)"):
            read_all(known.uri)


@pytest.mark.parametrize("name", ["zarr.json", "features/zarr.json", "step/zarr.json", "index.parquet", "step/c/0"])
def test_a_missing_document_is_an_error(known: KnownStore, name: str) -> None:
    path = Path(known.uri) / name
    path.unlink()
    with pytest.raises(StoreError, match=r"missing|has no zarr\.json"):
        read_all(known.uri)
    path.mkdir()  # and a folder is no document
    with pytest.raises((StoreError, IsADirectoryError)):
        read_all(known.uri)


def test_any_flipped_bit_of_the_index_is_noticed_or_harmless(known: KnownStore) -> None:
    expected, index = FeatureStore(known.uri).read(5), FeatureStore(known.uri).index
    path = Path(known.uri) / layout.INDEX
    data = path.read_bytes()
    noticed = 0
    positions = range(0, len(data), max(1, len(data) // 200))
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            store = FeatureStore(known.uri)
            looked_up = store.lookup
            seen = store.index.select(["key", "status", "chunk_offset", "chunk_nbytes"])
        except StoreError:
            noticed += 1
        else:
            assert seen.equals(index.select(seen.column_names)), f"byte {position} changed the index without a word"
            assert looked_up.equals(index.select(looked_up.column_names))
            assert np.array_equal(store.read(5), expected)
    assert noticed > len(positions) / 2


@pytest.mark.parametrize("name", ["configuration", "configuration_hash", "setup_complete", "format_version"])
@pytest.mark.parametrize("value", [None, 3, "text", [], [1], {"a": 1}, True])
def test_attributes_of_another_type_are_damage(known: KnownStore, name: str, value: Any) -> None:
    expected = {"configuration": dict, "configuration_hash": str, "setup_complete": bool, "format_version": int}
    if isinstance(value, expected[name]):
        return

    def change(document: Any) -> Any:
        document["attributes"]["densefeat"][name] = value
        return document

    rewritten(Path(known.uri) / "zarr.json", change)
    with pytest.raises(StoreError, match=name.replace("_", "[_ ]")):
        FeatureStore(known.uri)


@pytest.mark.parametrize("value", [None, 3, "text", [], [1], True])
@pytest.mark.parametrize("where", ["attributes", "densefeat"])
def test_documents_of_another_type_are_damage(known: KnownStore, where: str, value: Any) -> None:
    def change(document: Any) -> Any:
        (document if where == "attributes" else document["attributes"])[where] = value
        return document

    rewritten(Path(known.uri) / "zarr.json", change)
    with pytest.raises(StoreError, match="not a feature store"):
        FeatureStore(known.uri)


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *[inner for name, value in items for inner in paths_of(value, (*path, name))]]


def test_array_metadata_with_any_part_replaced(known: KnownStore) -> None:
    # What is not an error must not matter: the values are as they were.
    path = Path(known.uri) / "features/zarr.json"
    document, expected = json.loads(path.read_text()), read_all(known.uri)
    for where in paths_of(document)[1:]:
        for value in (None, -1, 0, 3, 2.5, True, "text", [], {}, [1, 2, 3, 4]):
            changed = json.loads(json.dumps(document))
            parent = changed
            for name in where[:-1]:
                parent = parent[name]
            parent[where[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                store = FeatureStore(known.uri)
                for row in GOOD_ROWS:
                    assert np.array_equal(store.read(row), expected[row]), (where, value)
            except StoreError:
                pass


def test_metadata_of_other_codecs_is_refused(known: KnownStore) -> None:
    path = Path(known.uri) / "features/zarr.json"
    path.write_text(path.read_text().replace('"zstd"', '"gzip"'))
    with pytest.raises(StoreError, match=r"features/zarr\.json is damaged: expected shards .* 'gzip'"):
        FeatureStore(known.uri)


def test_nested_without_end(known: KnownStore) -> None:
    (Path(known.uri) / "zarr.json").write_text("[" * 200_000)
    with pytest.raises(StoreError, match="damaged"):
        FeatureStore(known.uri)


def changed_index(known: KnownStore, change: Callable[[pa.Table], pa.Table]) -> None:
    path = Path(known.uri) / layout.INDEX
    path.write_bytes(parquet_bytes(change(read_parquet(path.read_bytes()))))


def with_column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    def change(index: pa.Table) -> pa.Table:
        return index.set_column(index.column_names.index(name), name, values)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.slice(0, 7), "it has 7 rows, the features have 11"),
        (lambda index: pa.concat_tables([index, index]), "it has 22 rows"),
        (lambda index: index.slice(0, 0), "it has 0 rows"),
        (lambda index: index.take(list(range(ROWS))[::-1]), "not numbered from 0"),
        (lambda index: index.drop_columns(["chunk_offset"]), "0 columns 'chunk_offset'"),
        (with_column("label", pa.array(["a"] * ROWS)), "'label' holds string, expected int64"),
        (with_column("key", pa.array(range(ROWS))), "'key' holds int64, expected string"),
        (with_column("chunk_nbytes", pa.array([1.5] * ROWS)), "'chunk_nbytes' holds double"),
        (lambda index: index.append_column("key", index["uri"]), "2 columns 'key'"),
    ],
)
def test_another_index_is_damage(known: KnownStore, change: Callable[[pa.Table], pa.Table], words: str) -> None:
    changed_index(known, change)
    for read in (lambda: FeatureStore(known.uri).read(0), lambda: TorchFeatures(known.uri)):
        with pytest.raises(StoreError, match=rf"index\.parquet is damaged: .*{words}.*--repair"):
            read()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("chunk_offset", [10**9] * ROWS),
        ("chunk_nbytes", [10**9] * ROWS),
        ("chunk_nbytes", [0] * ROWS),
        ("chunk_nbytes", [1] * ROWS),
        ("chunk_offset", [-5] * ROWS),
        ("chunk_nbytes", [-5] * ROWS),
        ("chunk_offset", [None] * ROWS),
    ],
)
def test_a_place_that_is_none_is_damage(known: KnownStore, name: str, values: list[Any]) -> None:
    changed_index(known, with_column(name, pa.array(values, pa.int64())))
    for row in GOOD_ROWS:
        with pytest.raises(StoreError, match=rf"row {row} .*|index\.parquet is damaged"):
            FeatureStore(known.uri).read(row)


def test_a_lost_affine_map_is_damage(known: KnownStore) -> None:
    changed_index(known, with_column("affine", pa.nulls(ROWS, pa.list_(pa.float64(), 6))))
    store = FeatureStore(known.uri)
    assert store.sample(5, [[1, 1]]).shape == (1, 5)
    with pytest.raises(StoreError, match="row 5: it has the affine map"):
        store.sample(5, [[1, 1]], coordinates="image")


def test_columns_that_reading_does_not_need_are_not_decoded(known: KnownStore) -> None:
    keys = FeatureStore(known.uri).index["key"].to_pylist()
    changed_index(known, lambda index: index.drop_columns(["affine", "uri"]))
    store = FeatureStore(known.uri)
    assert np.array_equal(store.read_codes(5), known.codes[5])
    assert (store.keys, store.row_of(keys[4])) == (keys, 4)
    with pytest.raises(StoreError, match="0 columns 'affine'"):
        store.geometry(5)
    with pytest.raises(StoreError, match="0 columns 'affine'"):
        _ = store.index


def test_steps_of_another_number_of_components_are_damage(known: KnownStore, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(known.uri, other)
    for name in ("zarr.json", "c/0"):
        shutil.copy(Path(known.uri) / "pca/mean" / name, other / "step" / name)
    with pytest.raises(StoreError, match=r"the array step is damaged: its shape is \(9,\)"):
        FeatureStore(other).read(0)


def test_arrays_that_are_not_there_or_not_small(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    with pytest.raises(StoreError, match=r"the array nothing is missing"):
        store.array("nothing")
    with pytest.raises(StoreError, match="expected an array of one chunk"):
        store.array("features")


LEDGER_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "another file": lambda data: b"PAR1 not a record PAR1",
    "a flipped bit": lambda data: data[:40] + bytes([data[40] ^ 8]) + data[41:],
    "other rows": lambda data: parquet_bytes(with_column("row", pa.array([0, 1, 2, 3]))(read_parquet(data))),
    "fewer rows": lambda data: parquet_bytes(read_parquet(data).slice(0, 2)),
    "no status": lambda data: parquet_bytes(read_parquet(data).drop_columns(["status"])),
    "other types": lambda data: parquet_bytes(with_column("height", pa.array(["a"] * 4))(read_parquet(data))),
}


@pytest.mark.parametrize("damage", LEDGER_DAMAGE)
def test_a_damaged_record_leaves_its_rows_pending(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = set_up_store(str(tmp_path / "store"))
    for shard in (0, 1):
        write_known_shard(known, shard)
    path = Path(known.uri) / layout.ledger_key(1)
    path.write_bytes(LEDGER_DAMAGE[damage](path.read_bytes()))
    store = FeatureStore(known.uri)
    with caplog.at_level(logging.WARNING, "densefeat.rows.index"):
        assert np.array_equal(store.read_codes(0), known.codes[0])
    assert f"{layout.ledger_key(1)} is damaged" in caplog.text
    for row in range(SHARD_ROWS, 2 * SHARD_ROWS):
        with pytest.raises(MissingFeatures, match="not done yet"):
            store.read(row)


def test_an_unfinished_store_is_what_it_was_at_the_first_look(tmp_path: Path) -> None:
    """Whatever a job writes meanwhile: rows that had no features then have none, and none is damaged."""
    known = set_up_store(str(tmp_path / "store"))
    write_known_shard(known, 1)
    store = FeatureStore(known.uri)
    assert np.array_equal(store.read_codes(4), known.codes[4])
    write_known_shard(known, 0)
    assert store.geometry(4).feature_size == store.shape[1:]
    with pytest.raises(MissingFeatures, match="not done yet"):
        store.read(0)
    assert np.isnan(store.read([0, 4], missing="nan")[0]).all()
    assert store.index["status"].to_pylist() == store.lookup["status"].to_pylist()
    assert np.array_equal(FeatureStore(known.uri).read_codes(0), known.codes[0])


def test_an_unfinished_index_is_what_the_ledger_says(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    for shard in (2, 0):
        write_known_shard(known, shard)
    index = FeatureStore(known.uri).index
    finished = FeatureStore(make_store(str(tmp_path / "finished")).uri).index
    assert index.schema == finished.schema
    for rows in (range(SHARD_ROWS), range(2 * SHARD_ROWS, ROWS)):
        assert index.slice(rows.start, len(rows)).equals(finished.slice(rows.start, len(rows)))
    pending = index.slice(SHARD_ROWS, SHARD_ROWS)
    assert pending["status"].to_pylist() == ["pending"] * SHARD_ROWS
    assert pending["chunk_offset"].null_count == SHARD_ROWS
    assert pending["key"].equals(finished["key"].slice(SHARD_ROWS, SHARD_ROWS))
