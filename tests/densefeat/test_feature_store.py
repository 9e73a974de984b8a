import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

import densefeat.rows.index
from densefeat import FeatureStore, MissingFeatures, StoreError, TorchFeatures, layout
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from pipeline.store.layout import finish
from tests.helpers.stores import (
    FAILED_ROWS,
    ROWS,
    SHARD_ROWS,
    C,
    H,
    K,
    KnownStore,
    W,
    make_store,
    set_up_store,
    write_known_shard,
)

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]


@pytest.fixture(scope="module", params=["int8", "float16"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / request.param), request.param)


def floats(known: KnownStore, row: int) -> np.ndarray:
    codes = known.codes[row].astype(np.float32)
    return codes if known.step is None else codes * known.step[:, None, None]


def test_reads_what_was_written(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    assert len(store) == ROWS
    assert store.shape == (K, H, W)
    for row in GOOD_ROWS:
        features = store.read(row)
        assert features.dtype == np.float32
        assert np.array_equal(features, floats(known, row))
        assert np.array_equal(store.read_codes(row), known.codes[row])
        assert np.array_equal(store.read(store.keys[row]), features)
    assert np.array_equal(store.read(-1), floats(known, ROWS - 1))


def test_a_box_is_a_part_of_the_row(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    assert np.array_equal(store.read(4, box=(1, 2, H, 7)), floats(known, 4)[:, 1:, 2:7])
    for box in [(0, 0, 0, 5), (-1, 0, 3, 3), (0, 0, H + 1, 3), (5, 5, 4, 6)]:
        with pytest.raises(ValueError, match="box"):
            store.read(4, box=box)


def test_samples_are_bilinear_between_pixel_centres(known: KnownStore) -> None:
    store, truth = FeatureStore(known.uri), floats(known, 5)
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, [W + 1, H + 1], size=(50, 2))
    grid = torch.from_numpy(points / [W, H] * 2 - 1).float()[None, None]
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(truth)[None], grid, align_corners=False, padding_mode="border"
    )
    assert np.allclose(store.sample(5, points), expected[0, :, 0].T.numpy(), atol=1e-4)
    assert np.allclose(store.sample(5, [[0.5, 0.5], [W - 0.5, H - 0.5]]), truth[:, [0, -1], [0, -1]].T)
    # The original is twice as large and shifted: see stores.outcome.
    assert np.allclose(store.sample(5, 2 * points + [4, 2], coordinates="image"), store.sample(5, points), atol=1e-5)
    with pytest.raises(ValueError, match="points_xy"):
        store.sample(5, [1, 2])
    with pytest.raises(ValueError, match="coordinates"):
        store.sample(5, points, coordinates="pixels")


def test_reconstructs_channels(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    features = store.read(0)
    channels = store.reconstruct(features)
    assert channels.shape == (C, H, W)
    assert channels.dtype == np.float32
    back = np.einsum("kc,chw->khw", known.basis.components, channels - known.basis.mean[:, None, None])
    assert np.allclose(back, features, atol=1e-4)
    assert np.allclose(store.reconstruct(features[:, 3, 4]), channels[:, 3, 4], atol=1e-5)
    with pytest.raises(ValueError, match="k=5"):
        store.reconstruct(features[:2])


@pytest.mark.parametrize("row", FAILED_ROWS)
def test_a_failed_row_says_why(known: KnownStore, row: int) -> None:
    store = FeatureStore(known.uri)
    for read in (store.read, store.read_codes, lambda r: store.sample(r, [[1, 1]])):
        with pytest.raises(MissingFeatures, match="corrupt: image file is truncated") as caught:
            read(row)
        assert (caught.value.row, caught.value.status) == (row, "corrupt")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.row, str(again)) == (row, str(caught.value))


@pytest.mark.parametrize("scanned", [True, False])
def test_keys_are_found_by_scans_and_by_their_dict(
    known: KnownStore, scanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(known.uri)
    index = read_parquet(objects.get(layout.INDEX))
    keys = index["key"].to_pylist()
    keys[5] = keys[9]
    number = index.schema.get_field_index("key")
    objects.put(layout.INDEX, parquet_bytes(index.set_column(number, index.schema.field(number), pa.array(keys))))
    monkeypatch.setattr("densefeat.rows.index._KEYS_IN_A_DICT", 0 if scanned else 100)
    store = FeatureStore(known.uri)
    assert [store.row_of(keys[row]) for row in (0, 3, 10)] == [0, 3, 10]
    assert keys[4] in store
    assert "nothing" not in store
    assert "\udce9" not in store
    assert ("_row_of_key" in vars(store)) is not scanned
    with pytest.raises(KeyError, match=r"no row has the key 'nothing'; keys look like 'class/000\.jpg'"):
        store.row_of("nothing")
    with pytest.raises(KeyError, match=r"several rows have the key 'class/009\.jpg'"):
        store.row_of(keys[9])
    for _ in range(60):
        store.row_of(keys[1])
    assert "_row_of_key" in vars(store)


def test_unknown_rows_and_keys(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    with pytest.raises(KeyError, match=r"class/000\.jpg"):
        store.read("nothing")
    for row in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match=str(row)):
            store.read(row)


def test_an_unfinished_store_serves_what_is_done(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    write_known_shard(known, 1)
    store = FeatureStore(known.uri)
    assert np.array_equal(store.read_codes(SHARD_ROWS), known.codes[SHARD_ROWS])
    with pytest.raises(MissingFeatures, match="not done yet"):
        store.read(0)
    assert store.index["status"].to_pylist().count("pending") == ROWS - SHARD_ROWS
    assert list(TorchFeatures(store).rows) == [4, 5, 6, 7]


def test_opening_while_the_job_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = set_up_store(str(tmp_path / "store"))
    records = [write_known_shard(known, shard) for shard in range(3)]
    objects = Objects(known.uri)

    def read_then_finish(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
        monkeypatch.undo()  # once; finishing reads the index too
        finish(objects, records)
        return read_parquet(data, columns)

    monkeypatch.setattr(densefeat.rows.index, "read_parquet", read_then_finish)
    assert "pending" not in FeatureStore(known.uri).index["status"].to_pylist()


def test_damage_is_an_error_not_wrong_numbers(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    store = FeatureStore(known.uri)
    path = tmp_path / "store" / layout.shard_key(1)
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"row 4 .* damaged"):
        store.read(4)
    assert np.array_equal(store.read_codes(5), known.codes[5])
    path.unlink()
    with pytest.raises(StoreError, match="row 5 is missing"):
        store.read(5)


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no zarr\.json"):
        FeatureStore(str(tmp_path))
    zarr.create_group(str(tmp_path / "other"), zarr_format=3)
    with pytest.raises(StoreError, match="not a feature store"):
        FeatureStore(str(tmp_path / "other"))
    known = make_store(str(tmp_path / "store"))
    metadata_of_features = tmp_path / "store" / "features" / "zarr.json"
    kept = metadata_of_features.read_text()
    metadata_of_features.unlink()
    with pytest.raises(StoreError, match=r"features/zarr\.json is missing"):
        FeatureStore(known.uri)
    metadata_of_features.write_text(kept)
    root = tmp_path / "store" / "zarr.json"
    original = root.read_text()
    root.write_text(original.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(StoreError, match="version 99"):
        FeatureStore(known.uri)
    for damaged in ("{", "[]"):
        root.write_text(damaged)
        with pytest.raises(StoreError, match="damaged"):
            FeatureStore(known.uri)
    metadata = json.loads(original)
    metadata["attributes"]["densefeat"]["setup_complete"] = False
    root.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="still being set up"):
        FeatureStore(known.uri)


def test_pickles_small(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    store.read(0)
    data = pickle.dumps(store)
    assert b"class/003.jpg" not in data
    assert np.array_equal(pickle.loads(data).read(3), store.read(3))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataset_in_workers(known: KnownStore, start_method: str) -> None:
    dataset = TorchFeatures(known.uri)
    dataset[0]  # the parent has used the store: what breaks s3fs and others after fork
    context = multiprocessing.get_context(start_method)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.cat([batch["row"] for batch in batches]).tolist() == GOOD_ROWS
    features = torch.cat([batch["features"] for batch in batches]).numpy()
    assert np.array_equal(features, np.stack([floats(known, row) for row in GOOD_ROWS]))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [row % 3 for row in GOOD_ROWS]
    assert batches[0]["key"][0] == "class/000.jpg"


def test_dataset_gives_codes_and_transforms(known: KnownStore) -> None:
    dataset = TorchFeatures(known.uri, lambda sample: sample["features"] + 0, dequantize=False)
    codes = dataset[1]
    assert codes.dtype == (torch.int8 if known.step is not None else torch.float16)
    assert np.array_equal(codes.numpy(), known.codes[1])
    assert (dataset.step is None) == (known.step is None)


def test_reading_an_index_starts_no_threads(known: KnownStore) -> None:
    # Threads of Arrow's that are still at work when a program ends have killed it (densefeat/storage/parquet.py).
    program = (
        "import os, sys; from densefeat import FeatureStore; store = FeatureStore(sys.argv[1])\n"
        "before = len(os.listdir('/proc/self/task')); store.index.to_pylist()\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    finished = subprocess.run([sys.executable, "-c", program, known.uri], check=True, capture_output=True, text=True)
    assert finished.stdout == "0\n"


def test_reading_needs_neither_torch_nor_aiohttp(known: KnownStore) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'aiohttp', 's3fs', 'numba', 'PIL', 'xarray']))\n"
        "from densefeat import FeatureStore; print(FeatureStore(sys.argv[1]).read(0).shape)"
    )
    finished = subprocess.run([sys.executable, "-c", program, known.uri], check=True, capture_output=True, text=True)
    assert finished.stdout == f"{(K, H, W)}\n"


def test_an_early_index_with_lists_of_fixed_size(known: KnownStore, tmp_path: Path) -> None:
    index = FeatureStore(known.uri).index
    sizes = {"affine": 6, "valid_box": 4}
    fields = [
        field.with_type(pa.list_(field.type.value_type, sizes[field.name])) if field.name in sizes else field
        for field in index.schema
    ]
    early = pa.table([pa.array(index[f.name].to_pylist(), f.type) for f in fields], pa.schema(fields))
    assert early["affine"].null_count == len(FAILED_ROWS)
    assert read_parquet(parquet_bytes(early)).equals(index)
