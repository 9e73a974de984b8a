import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from stores import FAILED_ROWS, ROWS, KnownStore, basis, make_store, references, set_up_store, write_known_shard

from densefeat import FeatureStore, StoreError, layout
from densefeat.layout import FeatureLayout
from densefeat.objects import Objects
from pipeline.errors import JobError
from pipeline.repair import take_out
from pipeline.storage_errors import explain_storage_error
from pipeline.store import (
    check_writable,
    delete_store,
    existing_store,
    finish,
    finished_shards,
    set_up,
)
from pipeline.verify import StoreCheck
from schemas.attributes import StoreAttributes
from schemas.index import pending_index


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return make_store(str(tmp_path / "store"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def problems(uri: str) -> dict[int, list[str]]:
    check = StoreCheck(uri)
    return {shard: found for shard in check.recorded if (found := check.shard(shard))}


def test_a_store_can_be_set_up_once(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    with pytest.raises(FileExistsError):
        set_up_store(known.uri)
    stored = existing_store(Objects(known.uri))
    assert stored is not None
    assert stored.setup_complete
    assert stored.class_names == ("a", "b", "c")


def test_setup_that_died_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(str(tmp_path / "store"))
    features = FeatureLayout(ROWS, 5, 12, 10, "float16", 4)
    attributes = StoreAttributes({"pca": {}}, {})
    put, written = Objects.put, []

    def put_until_killed(self: Objects, key: str, data: bytes) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(key)
        put(self, key, data)

    monkeypatch.setattr(Objects, "put", put_until_killed)
    with pytest.raises(KeyboardInterrupt):
        set_up(objects, attributes, features, basis(), None, pending_index(references()))
    monkeypatch.undo()
    claimed = existing_store(objects)
    assert claimed is not None
    assert not claimed.setup_complete
    with pytest.raises(StoreError, match="still being set up"):
        FeatureStore(objects.uri)
    set_up(objects, attributes, features, basis(), None, pending_index(references()), claimed=True)
    assert len(FeatureStore(objects.uri)) == ROWS


def test_a_shard_is_done_when_its_record_is_there(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    write_known_shard(known, 1)
    objects.put(layout.shard_key(0), b"an object without a record")
    assert list(finished_shards(objects, known.configuration_hash)) == [1]
    record = finished_shards(objects, known.configuration_hash)[1]
    assert (record.rows_ok, record.rows_failed) == (4, 0)
    assert record.nbytes == objects.list("features/c")[layout.shard_key(1)]


def test_records_of_lost_or_changed_objects_are_dropped(known: KnownStore) -> None:
    objects = Objects(known.uri)
    objects.delete(layout.shard_key(0))
    objects.put(layout.shard_key(2), objects.get(layout.shard_key(2))[:-5])
    objects.put(layout.ledger_key(1), b"PAR1 not a record PAR1")
    assert finished_shards(objects, known.configuration_hash) == {}
    assert objects.list(layout.LEDGER) == {}


def test_shards_of_another_configuration_are_not_done(known: KnownStore) -> None:
    objects = Objects(known.uri)
    assert sorted(finished_shards(objects, known.configuration_hash)) == [0, 1, 2]
    assert finished_shards(objects, "f" * 64) == {}


def test_making_a_shard_twice_is_fine_if_the_bytes_are_the_same(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    first = write_known_shard(known, 0)
    assert write_known_shard(known, 0) == first
    path = Path(known.uri) / layout.shard_key(0)
    committed = path.read_bytes()
    known.codes[0, 0, 0, 0] ^= 1
    with pytest.raises(JobError, match="in the ledger with other bytes"):
        write_known_shard(known, 0)
    assert path.read_bytes() == committed


def test_deleting_a_store_deletes_nothing_else(known: KnownStore) -> None:
    folder = Path(known.uri)
    for name in ("notes.txt", "features/mine.npy", "photos/1.jpg", "_ledger/readme.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    delete_store(Objects(known.uri))
    assert sorted(Objects(known.uri).list()) == ["_ledger/readme.md", "features/mine.npy", "notes.txt", "photos/1.jpg"]


@pytest.mark.parametrize("name", ["step", "pca/mean", "pca/components"])
def test_a_lost_or_changed_small_array_is_never_zeros(known: KnownStore, name: str) -> None:
    (chunk,) = (path for path in (Path(known.uri) / name / "c").rglob("*") if path.is_file())
    data = chunk.read_bytes()
    flip(chunk, len(data) // 2)
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        FeatureStore(known.uri).array(name)
    assert "damaged" in StoreCheck(known.uri).store()[0]
    chunk.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        FeatureStore(known.uri).array(name)
    assert "missing" in StoreCheck(known.uri).store()[0]


def test_finishing_merges_outcomes(known: KnownStore) -> None:
    index = FeatureStore(known.uri).index
    assert index["status"].to_pylist() == ["corrupt" if row in FAILED_ROWS else "ok" for row in range(ROWS)]
    assert index["key"].to_pylist() == references()["key"].to_pylist()
    assert index["valid_box"][0].as_py() == [0, 0, 12, 10]
    manifest = pq.read_table(Path(known.uri) / layout.MANIFEST)
    assert manifest["shard"].to_pylist() == [0, 1, 2]
    assert manifest["rows_failed"].to_pylist() == [1, 0, 1]
    assert manifest["sha256"].to_pylist() == [record.sha256 for record in known.records]
    assert not (Path(known.uri) / "_tmp").exists()


def test_finishing_with_a_shard_missing_is_an_error(known: KnownStore) -> None:
    with pytest.raises(ValueError, match="11 rows and the ledger records 8"):
        finish(Objects(known.uri), [known.records[0], known.records[1]][::-1][:2])


def test_verifying_finds_nothing_in_a_whole_store(known: KnownStore) -> None:
    check = StoreCheck(known.uri)
    assert check.recorded == [0, 1, 2]
    assert check.store() == []
    assert problems(known.uri) == {}


def test_verifying_finds_damage_and_repair_reopens(known: KnownStore) -> None:
    folder = Path(known.uri)
    flip(folder / layout.shard_key(1), 5)
    (folder / layout.shard_key(2)).unlink()
    found = problems(known.uri)
    assert "rows [4]" in found[1][-1]
    assert "gone" in found[2][-1]
    take_out(Objects(known.uri), [1, 2])
    store = FeatureStore(known.uri)
    assert store.index["status"].to_pylist() == ["ok", "ok", "corrupt", "ok", *["pending"] * 7]
    assert list(finished_shards(Objects(known.uri), known.configuration_hash)) == [0]
    records = [known.records[0], *(write_known_shard(known, shard) for shard in (1, 2))]
    finish(Objects(known.uri), records)
    assert np.array_equal(FeatureStore(known.uri).read_codes(10), known.codes[10])


def test_verifying_finds_a_changed_index(known: KnownStore) -> None:
    path = Path(known.uri) / layout.INDEX
    index = pq.read_table(path)
    column = index.schema.get_field_index("status")
    index = index.set_column(column, index.schema.field(column), pa.array(["ok"] * ROWS))
    pq.write_table(index, path)
    assert "rows 0 … 3" in StoreCheck(known.uri).store()[0]


def test_verifying_finds_another_basis_and_other_steps(known: KnownStore) -> None:
    group = zarr.open_group(known.uri, mode="r+")
    group["step"][0] = 7
    group["pca/mean"][0] = 7
    assert StoreCheck(known.uri).store() == [
        "the PCA basis is not the one that the attributes name",
        "the quantization steps are not those that the attributes name",
    ]


def test_storage_errors_are_explained() -> None:
    from botocore.exceptions import NoCredentialsError

    for error, words in [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for s3://b"),
        (PermissionError(errno.EACCES, "denied"), "no permission"),
        (OSError(errno.EROFS, "read-only"), "no permission"),
        (NoCredentialsError(), "AWS_ACCESS_KEY_ID"),
    ]:
        explained = explain_storage_error(error, "s3://b")
        assert explained is not None
        assert words in str(explained)
    assert explain_storage_error(ConnectionError("reset"), "s3://b") is None


def test_an_unwritable_place_is_found_before_work() -> None:
    with pytest.raises(OSError, match="/proc"):
        check_writable(Objects("/proc/densefeat"))
