"""Several rows in one call, in parallel and in order; the errors for rows and packages that are missing."""

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densefeat import FeatureStore, MissingFeatures, StoreError, layout
from densefeat.storage.parallel import in_order
from tests.helpers.stores import FAILED_ROWS, ROWS, H, K, KnownStore, W, make_store, set_up_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["int8", "float16"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / request.param), request.param)


@pytest.mark.parametrize("rows", [[5, "class/003.jpg", -1, 5], (4,), np.array([7, 0]), slice(3, 8), [], range(3, 5)])
def test_rows_are_stacked_in_order(known: KnownStore, rows: Any) -> None:
    store = FeatureStore(known.uri)
    numbers = range(ROWS)[rows] if isinstance(rows, slice) else [store.row_of(row) for row in rows]
    expected = np.array([store.read(row) for row in numbers]).reshape(-1, K, H, W)
    for threads in (1, 3):
        features = store.read(rows, threads=threads)
        assert features.dtype == np.float32
        assert np.array_equal(features, expected)
    assert np.array_equal(store[rows], expected)
    assert np.array_equal(store.read(rows, (1, 2, 5, 4)), expected[:, :, 1:5, 2:4])


def test_one_row_by_subscript(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    assert np.array_equal(store[0], store.read(0))
    assert np.array_equal(store["class/003.jpg"], store.read(3))
    assert "class/003.jpg" in store
    assert "class/999.jpg" not in store
    with pytest.raises(IndexError):
        store[ROWS]


def test_rows_without_features(known: KnownStore) -> None:
    store, rows = FeatureStore(known.uri), [9, 8, 3, 2]
    with pytest.raises(MissingFeatures, match=r"2 rows have no features: 8, 2; .*image file is truncated") as caught:
        store.read(rows)
    assert caught.value.rows == (8, 2)
    assert (caught.value.row, caught.value.status) == (8, "corrupt")
    assert pickle.loads(pickle.dumps(caught.value)).rows == (8, 2)
    filled = store.read(rows, missing="nan")
    assert np.isnan(filled[[1, 3]]).all()
    assert np.array_equal(filled[[0, 2]], store.read([9, 3]))
    assert np.array_equal(store.read(rows, missing="skip"), store.read([9, 3]))
    assert np.isnan(store.read(2, box=(0, 0, 2, 3), missing="nan")).all()
    assert store.read(2, box=(0, 0, 2, 3), missing="nan").shape == (K, 2, 3)
    assert store.rows_with_features.tolist() == [row for row in range(ROWS) if row not in FAILED_ROWS]
    with pytest.raises(ValueError, match="several rows"):
        store.read(2, missing="skip")
    with pytest.raises(ValueError, match="missing must be"):
        store.read(rows, missing="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads"):
        store.read(rows, threads=0)


def test_iteration_stops_at_a_row_without_features(known: KnownStore) -> None:
    rows = iter(FeatureStore(known.uri))
    assert np.array_equal([next(rows), next(rows)], FeatureStore(known.uri).read([0, 1]))
    with pytest.raises(MissingFeatures, match="row 2"):
        next(rows)


def test_damage_among_several_rows_is_an_error(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    path = tmp_path / "store" / layout.shard_key(1)
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    for missing in ("raise", "nan", "skip"):
        with pytest.raises(StoreError, match=r"row 4 .* damaged"):
            FeatureStore(known.uri).read([0, 4, 5], missing=missing)  # type: ignore[arg-type]


def test_labels_and_names(known: KnownStore, tmp_path: Path) -> None:
    store = FeatureStore(known.uri)
    assert store.class_names == ("a", "b", "c")
    assert store.labels.tolist() == [row % 3 for row in range(ROWS)]
    assert store.label("class/004.jpg") == store.label(4) == 1
    with pytest.raises(ValueError, match="read-only"):
        store.labels[0] = 1
    damaged = set_up_store(str(tmp_path / "store"))
    root = tmp_path / "store" / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["densefeat"]["class_names"] = ["a", 3]
    root.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="class_names is damaged"):
        FeatureStore(damaged.uri).class_names  # noqa: B018


def test_results_come_in_order_and_few_ahead() -> None:
    begun, gate = [], threading.Event()

    def work(i: int) -> int:
        begun.append(i)
        if i == 0:
            assert gate.wait(10)
        else:
            gate.set()  # a later item ends first
        return i

    results = in_order(work, range(100), 2)
    assert next(results) == 0
    assert max(begun) <= 2
    assert list(results) == list(range(1, 100))


def test_the_first_error_in_order_ends_the_work() -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        if i >= 3:
            raise ValueError(str(i))
        return i

    def consume(results: Iterator[int]) -> None:
        for _ in results:
            pass

    with pytest.raises(ValueError, match=r"^3$"):
        consume(in_order(work, range(1000), 4))
    assert max(begun) < 20


@pytest.mark.parametrize(
    ("package", "statement", "extra"),
    [
        ("s3fs", "FeatureStore('s3://bucket/store')", "s3"),
        ("gcsfs", "FeatureStore('gs://bucket/store')", "gcs"),
        ("aiohttp", "FeatureStore('https://example.invalid/store')", "http"),
        ("torch", "densefeat.TorchFeatures", "torch"),
        ("torch", "densefeat.PixelFeatures", "torch"),
        ("PIL", "densefeat.MaskFolder('masks')", "masks"),
    ],
)
def test_a_missing_package_names_its_extra(package: str, statement: str, extra: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"  # as if not installed
        "import densefeat; from densefeat import FeatureStore, MissingPackage\n"
        f"try: {statement}\n"
        "except MissingPackage as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"pip install 'densefeat[{extra}]'" in done.stdout
