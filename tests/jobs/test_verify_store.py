"""``jobs/verify_store.py``: damage is a finding with its name, never a fault; ``--repair`` mends it."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from densefeat import FeatureStore, MissingFeatures, StoreError, layout
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.images.listing.source import keys_digest
from tests.helpers.stores import FAILED_ROWS, ROWS, KnownStore, make_store, references, set_up_store, write_known_shard

TABLES = (layout.INDEX, layout.MANIFEST)


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    """A finished store, and the images that it says it was made of."""
    photos = tmp_path / "photos"
    for key in references()["key"].to_pylist():
        (photos / key).parent.mkdir(parents=True, exist_ok=True)
        (photos / key).write_bytes(b"not looked into")
    source = {
        "images": str(photos),
        "limit": None,
        "kind": "folder",
        "image_column": None,
        "rows": ROWS,
        "keys_sha256": keys_digest(references()),
    }
    return make_store(str(tmp_path / "store"), source=source)


def bytes_of(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-1],
    "a flipped bit": lambda data: data[:50] + bytes([data[50] ^ 4]) + data[51:],
    "another file": lambda data: b"PAR1" * 10,
    "fewer rows": lambda data: parquet_bytes(read_parquet(data).slice(1)),
    "fewer columns": lambda data: parquet_bytes(
        read_parquet(data).drop_columns(["error" if b"error" in data else "sha256"])
    ),
}


# A missing manifest is no damage: the store is not finished.
@pytest.mark.parametrize(
    ("table", "damage"),
    [(table, damage) for table in TABLES for damage in DAMAGE if (table, damage) != (layout.MANIFEST, "missing")],
)
def test_a_damaged_table_is_found_and_rebuilt(
    known: KnownStore, table: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert verify(VerifyConfig(store=known.uri)) == 0
    whole, index, path = bytes_of(known.uri), FeatureStore(known.uri).index, Path(known.uri) / table
    damaged = DAMAGE[damage](path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        assert verify(VerifyConfig(store=known.uri)) == 1
    assert table in caplog.text
    assert verify(VerifyConfig(store=known.uri, repair=True)) == 1
    assert verify(VerifyConfig(store=known.uri)) == 0
    again = bytes_of(known.uri)
    assert {key for key in whole if whole[key] != again[key]} <= set(TABLES)
    rebuilt = FeatureStore(known.uri).index
    known_before = [name for name in index.column_names if name not in ("uri", "nbytes", "label")]
    assert rebuilt.select(known_before).equals(index.select(known_before))
    for row in set(range(ROWS)) - set(FAILED_ROWS):
        assert np.array_equal(FeatureStore(known.uri).read_codes(row), known.codes[row])


def test_a_rebuilt_index_has_the_images_that_were_listed_again(known: KnownStore, tmp_path: Path) -> None:
    (Path(known.uri) / layout.INDEX).unlink()
    verify(VerifyConfig(store=known.uri, repair=True))
    index = FeatureStore(known.uri).index
    assert index["uri"].to_pylist() == [str(tmp_path / "photos" / key) for key in references()["key"].to_pylist()]
    assert index["nbytes"].to_pylist() == [len(b"not looked into")] * ROWS


def gone(photos: Path) -> None:
    shutil.rmtree(photos)


def one_more(photos: Path) -> None:
    (photos / "class" / "zzz.jpg").write_bytes(b"")


def one_less(photos: Path) -> None:
    (photos / "class" / "003.jpg").unlink()


def another_name(photos: Path) -> None:
    (photos / "class" / "003.jpg").rename(photos / "class" / "003b.jpg")


@pytest.mark.parametrize(
    ("change", "words"),
    [(gone, "cannot be listed"), *[(change, "holds other images") for change in (one_more, one_less, another_name)]],
)
def test_other_images_are_refused_and_nothing_changes(
    known: KnownStore, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    (Path(known.uri) / layout.INDEX).write_bytes(b"")
    (Path(known.uri) / layout.shard_key(1)).write_bytes(b"")
    change(tmp_path / "photos")
    before = bytes_of(known.uri)
    with pytest.raises(JobError, match=f"the index of .* cannot be rebuilt: .*{words}"):
        verify(VerifyConfig(store=known.uri, repair=True))
    assert bytes_of(known.uri) == before


def test_images_are_listed_only_if_they_must_be(known: KnownStore, tmp_path: Path) -> None:
    gone(tmp_path / "photos")
    uris = FeatureStore(known.uri).index["uri"]
    path = Path(known.uri) / layout.INDEX
    index = read_parquet(path.read_bytes())
    path.write_bytes(
        parquet_bytes(index.set_column(index.column_names.index("status"), "status", pa.array(["ok"] * ROWS)))
    )
    (Path(known.uri) / layout.MANIFEST).write_bytes(b"")
    assert verify(VerifyConfig(store=known.uri, repair=True)) == 1
    assert verify(VerifyConfig(store=known.uri)) == 0
    assert FeatureStore(known.uri).index["uri"].equals(uris)


def test_other_keys_are_found(known: KnownStore, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(known.uri) / layout.INDEX
    index = read_parquet(path.read_bytes())
    keys = index["key"].to_pylist()[::-1]
    path.write_bytes(parquet_bytes(index.set_column(index.column_names.index("key"), "key", pa.array(keys))))
    assert verify(VerifyConfig(store=known.uri, repair=True)) == 1
    assert "the keys in the index do not match the attributes" in caplog.text
    assert verify(VerifyConfig(store=known.uri)) == 0
    assert FeatureStore(known.uri).keys == references()["key"].to_pylist()


def test_tables_and_shards_damaged_at_once(known: KnownStore) -> None:
    (Path(known.uri) / layout.INDEX).write_bytes(b"")
    shard = Path(known.uri) / layout.shard_key(1)
    data = bytearray(shard.read_bytes())
    data[5] ^= 1  # as long as before: only its digest tells
    shard.write_bytes(data)
    (Path(known.uri) / layout.ledger_key(2)).write_bytes(b"PAR1")
    assert verify(VerifyConfig(store=known.uri, repair=True)) == 1
    store = FeatureStore(known.uri)
    assert store.index["status"].to_pylist() == ["ok", "ok", "corrupt", "ok", *["pending"] * 7]
    assert not Objects(known.uri).exists(layout.MANIFEST)


def test_an_unfinished_store_with_a_damaged_record_and_index(
    known: KnownStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FeatureStore(known.uri).attributes["configuration"]["source"]
    store = set_up_store(str(tmp_path / "unfinished"), source=source)
    for shard in (0, 1):
        write_known_shard(store, shard)
    (Path(store.uri) / layout.ledger_key(1)).write_bytes(b"")
    (Path(store.uri) / layout.INDEX).write_bytes(b"")
    assert verify(VerifyConfig(store=store.uri, repair=True)) == 1
    assert "shard 1: its ledger record is damaged" in caplog.text
    assert FeatureStore(store.uri).index["status"].to_pylist().count("pending") == 7
    with pytest.raises(MissingFeatures, match="not done yet"):
        FeatureStore(store.uri).read(5)


@pytest.mark.parametrize("name", ["configuration", "configuration_hash"])
def test_nothing_is_repaired_by_damaged_attributes(known: KnownStore, name: str) -> None:
    # By another hash, every shard looks like another configuration's: repairing would take all of them out.
    path = Path(known.uri) / "zarr.json"
    document = json.loads(path.read_text())
    own = document["attributes"]["densefeat"]
    own[name] = "f" * 64 if name == "configuration_hash" else {**own[name], "seed": 1}
    path.write_text(json.dumps(document))
    (Path(known.uri) / layout.INDEX).write_bytes(b"")
    before = bytes_of(known.uri)
    damage = "the attributes are damaged: the configuration has unknown parts seed"
    words = damage if name == "configuration" else "the configuration does not match its hash"
    with pytest.raises(JobError, match=f"nothing was repaired: {words}"):
        verify(VerifyConfig(store=known.uri, repair=True))
    assert bytes_of(known.uri) == before


def test_damaged_attributes_are_told_once_and_hide_nothing_else(
    known: KnownStore, caplog: pytest.LogCaptureFixture
) -> None:
    attributes, path = Path(known.uri) / "zarr.json", Path(known.uri) / layout.INDEX
    document = json.loads(attributes.read_text())
    document["attributes"]["densefeat"]["configuration"]["seed"] = 1
    attributes.write_text(json.dumps(document))
    index = read_parquet(path.read_bytes())
    path.write_bytes(
        parquet_bytes(index.set_column(index.column_names.index("status"), "status", pa.array(["ok"] * ROWS)))
    )
    assert verify(VerifyConfig(store=known.uri)) == 1
    assert caplog.text.count("attributes") == caplog.text.count("the attributes are damaged") == 1
    assert "the index and the ledger differ in rows 0 … 3" in caplog.text


def test_a_store_whose_images_are_gone(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"), source={"images": str(tmp_path / "gone")})
    (Path(known.uri) / layout.INDEX).unlink()
    with pytest.raises(JobError, match=r"its images .*gone cannot be listed"):
        verify(VerifyConfig(store=known.uri, repair=True))


def test_without_its_metadata_there_is_no_store(known: KnownStore) -> None:
    for name in ("features/zarr.json", "zarr.json"):
        (Path(known.uri) / name).write_bytes(b"{")
        with pytest.raises(StoreError, match=rf"{name} is damaged"):
            verify(VerifyConfig(store=known.uri))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "without its end", "a flipped bit"])
def test_fast_finds_what_sizes_tell(known: KnownStore, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Lost and cut objects; changed bytes it leaves to the checksums of readers."""
    config = VerifyConfig(store=known.uri, fast=True)
    assert verify(config) == 0
    path = Path(known.uri) / layout.shard_key(1)
    whole = path.read_bytes()
    damaged = DAMAGE[damage](whole)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    caplog.clear()
    same_size = damaged is not None and len(damaged) == len(whole)
    with caplog.at_level(logging.ERROR):
        assert verify(config) == (0 if same_size else 1)
    assert ("shard 1: its object" in caplog.text) is not same_size
    assert verify(VerifyConfig(store=known.uri)) == 1


def test_fast_reads_no_shard(known: KnownStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = Objects.get
    monkeypatch.setattr(Objects, "get", lambda self, key: read.append(key) or get(self, key))
    assert verify(VerifyConfig(store=known.uri, fast=True)) == 0
    assert not [key for key in read if key.startswith(f"{layout.FEATURES}/c")]
