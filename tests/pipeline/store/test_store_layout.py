"""A store's objects: finishing, deleting and verifying them, and the place where they lie."""

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from densefeat import FeatureStore, StoreError, layout
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.io.errors import explain_storage_error
from pipeline.io.storage import check_writable, temporary_folder
from pipeline.store.layout import (
    delete_store,
    existing_store,
    finish,
    foreign_keys,
    remains,
)
from pipeline.store.repair import take_out
from pipeline.store.shard import finished_shards
from pipeline.store.verify import StoreCheck
from tests.helpers.killing import run_killed
from tests.helpers.stores import (
    FAILED_ROWS,
    ROWS,
    KnownStore,
    make_store,
    references,
    set_up_store,
    write_known_shard,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


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


def test_a_shard_is_done_when_its_record_is_there(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    objects = Objects(known.uri)
    write_known_shard(known, 1)
    objects.put(layout.shard_key(0), b"an object without a record")
    assert list(finished_shards(objects, known.configuration_hash)) == [1]
    record = finished_shards(objects, known.configuration_hash)[1]
    assert (record.rows_ok, record.rows_failed) == (4, 0)
    assert record.nbytes == objects.list("features/c")[layout.shard_key(1)]


def test_deleting_a_store_deletes_nothing_else(known: KnownStore) -> None:
    folder = Path(known.uri)
    for name in ("notes.txt", "features/mine.npy", "photos/1.jpg", "_ledger/readme.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    delete_store(Objects(known.uri))
    assert sorted(Objects(known.uri).list()) == ["_ledger/readme.md", "features/mine.npy", "notes.txt", "photos/1.jpg"]


def test_every_key_of_a_store_is_known_as_its_own(known: KnownStore) -> None:
    objects = Objects(known.uri)
    for key in ("_tmp/host-1-abc", f"_check/{'0' * 32}", layout.intent_key(3, "0" * 64), layout.ledger_key(12345678)):
        objects.put(key, b"")
    assert foreign_keys(objects) == []
    assert "_tmp/host-1-abc" not in remains(objects)
    others = [
        "_tmp/a/b", "_check/notes", "_intents/x.parquet", "_ledger/1.parquet", "features/c/8/0/0/0/0", "zarrXjson",
        "features/c/x/0/0/0", "pca/a/b/zarr.json", "step/c/1", "index.parquet.bak", "a/zarr.json", "manifest_parquet",
    ]  # fmt: skip
    for key in others:
        objects.put(key, b"mine")
    assert foreign_keys(objects) == sorted(others)
    delete_store(objects)
    assert sorted(objects.list()) == sorted(others)


@pytest.mark.parametrize("killed_before", range(0, 22, 3))
def test_a_deletion_that_died_leaves_a_store(known: KnownStore, killed_before: int) -> None:
    objects = Objects(known.uri)
    assert run_killed(killed_before, lambda: delete_store(objects))
    assert existing_store(objects) is not None
    assert not objects.exists(layout.MANIFEST) or killed_before == 0
    delete_store(objects)
    assert objects.list() == {}


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
    assert [path for path in Path(known.uri).rglob("*") if "partial" in path.name] == []


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
    assert "missing" in found[2][-1]
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
        "the PCA basis does not match the attributes",
        "the quantization steps do not match the attributes",
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


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_folder("densefeat-") as folder:
        (folder / "a").write_bytes(b"1")
    assert not folder.exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(JobError, match=r"nowhere.*set TMPDIR"), temporary_folder("densefeat-"):
        pass


def test_an_unwritable_place_is_found_before_work() -> None:
    with pytest.raises(JobError, match=r"^--store /proc/densefeat cannot be written: .*cannot create an object"):
        check_writable(Objects("/proc/densefeat"), "--store /proc/densefeat")


def test_checking_a_place_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    prepared.chmod(0o2770)
    before = prepared.stat()
    check_writable(Objects(prepared), "--store")
    check_writable(Objects(tmp_path / "new" / "deeper"), "--store")
    assert (prepared.stat().st_ino, prepared.stat().st_mode) == (before.st_ino, before.st_mode)
    assert list(tmp_path.rglob("*")) == [prepared]
    delete, calls = Objects.delete, []

    def refuse(self: Objects, key: str) -> None:
        calls.append(key)
        if len(calls) == 1:
            raise PermissionError(errno.EACCES, "denied")
        delete(self, key)

    monkeypatch.setattr(Objects, "delete", refuse)
    with pytest.raises(JobError, match=r"^no permission to write --store here: .*cannot delete an object"):
        check_writable(Objects(tmp_path / "new"), "--store here")
    assert list(tmp_path.rglob("*")) == [prepared]
