"""Other libraries open a store and find the same values in it: plain zarr, xarray, dask, tensorstore, zarrs."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr
import zarrs

from densefeat import FeatureStore, layout
from tests.helpers.servers.http_servers import serve
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
DIMENSIONS = {
    "features": ("row", "component", "y", "x"),
    "step": ("component",),
    "pca/mean": ("channel",),
    "pca/components": ("component", "channel"),
    "pca/explained_variance": ("component",),
    "pca/explained_variance_ratio": ("component",),
}


@pytest.fixture(scope="module", params=["int8", "float16"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / request.param), request.param)


def arrays(known: KnownStore) -> dict[str, np.ndarray]:
    """The small arrays of a store."""
    values = {f"pca/{name}": array for name, array in known.basis.__dict__.items()}
    return values if known.step is None else {"step": known.step, **values}


def expected_floats(known: KnownStore, done: list[int] = GOOD_ROWS) -> np.ndarray:
    """What ``FeatureStore.read`` gives, NaN where it gives nothing."""
    store = FeatureStore(known.uri)
    values = np.full((ROWS, K, H, W), np.nan, dtype=np.float32)
    for row in done:
        values[row] = store.read(row)
    return values


def xarray_floats(dataset: xarray.Dataset) -> Any:
    return dataset.features * dataset.step if "step" in dataset else dataset.features.astype("float32")


def test_xarray_opens_the_store_as_a_dataset(known: KnownStore) -> None:
    with xarray.open_zarr(known.uri) as dataset:
        assert dict(dataset.sizes) == {"row": ROWS, "component": K, "y": H, "x": W}
        assert dataset.features.dtype == ("float16" if known.step is None else "float32")
        features = xarray_floats(dataset)
        assert features.dims == DIMENSIONS["features"]
        assert features.dtype == np.float32
        assert np.array_equal(features.compute(), expected_floats(known), equal_nan=True)
        assert dataset.features.attrs["units"] == "1"
        assert "dense image features" in dataset.features.attrs["long_name"]
        # One row is one chunk, not a whole shard.
        assert dataset.features.encoding["preferred_chunks"]["row"] == 1


def test_xarray_opens_the_store_as_a_tree(known: KnownStore) -> None:
    with xarray.open_datatree(known.uri, engine="zarr") as tree:
        for name, values in arrays(known).items():
            assert np.array_equal(tree[name], values)
            assert tree[name].dims == DIMENSIONS[name]
            assert tree[name].attrs["long_name"]
        features = xarray_floats(tree.to_dataset())
        assert np.array_equal(features, expected_floats(known), equal_nan=True)
        channels = xarray.dot(tree["pca/components"], features, dim="component") + tree["pca/mean"]
        ours = FeatureStore(known.uri).reconstruct(expected_floats(known)[5])
        assert np.allclose(channels.isel(row=5).transpose("channel", "y", "x"), ours, atol=1e-4)


def test_xarray_knows_what_is_not_done_yet(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    write_known_shard(known, 1)
    expected = expected_floats(known, list(range(SHARD_ROWS, 2 * SHARD_ROWS)))
    with xarray.open_zarr(known.uri) as dataset:
        assert np.array_equal(xarray_floats(dataset).compute(), expected, equal_nan=True)


def test_xarray_opens_a_store_over_http_that_lists_nothing(known: KnownStore) -> None:
    with serve(known.uri) as server, xarray.open_zarr(server.uri, chunks=None) as dataset:
        assert np.array_equal(xarray_floats(dataset).isel(row=5), expected_floats(known)[5])


def test_dask_reads_the_array(known: KnownStore) -> None:
    features = dask.array.from_zarr(known.uri, component="features")
    assert features.chunksize == (1, K, H, W)
    with dask.config.set(scheduler="threads", num_workers=2):
        assert np.array_equal(features[GOOD_ROWS].compute(), known.codes[GOOD_ROWS])


def test_tensorstore_reads_every_array(known: KnownStore) -> None:
    for name, values in {"features": known.codes, **arrays(known)}.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{known.uri}/{name}"}}
        array = tensorstore.open(spec, read=True).result()
        assert array.domain.labels == DIMENSIONS[name]
        rows = GOOD_ROWS if name == "features" else slice(None)
        assert np.array_equal(array.read().result()[rows], values[rows])


def test_zarrs_reads_every_array(known: KnownStore) -> None:
    assert zarrs.__version__
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = zarr.open_group(known.uri, mode="r")
        assert np.array_equal(group["features"][:][GOOD_ROWS], known.codes[GOOD_ROWS])
        assert np.array_equal(group["features"][5, 1:3, 2:7, 4], known.codes[5, 1:3, 2:7, 4])
        for name, values in arrays(known).items():
            assert np.array_equal(group[name][:], values)


@pytest.mark.parametrize("use_consolidated", [True, False])
def test_plain_zarr_reads_the_same(known: KnownStore, use_consolidated: bool) -> None:
    group = zarr.open_group(known.uri, mode="r", zarr_format=3, use_consolidated=use_consolidated)
    for name in ("features", *arrays(known)):
        assert group[name].metadata.dimension_names == DIMENSIONS[name]
    assert np.array_equal(group["features"][:][GOOD_ROWS], known.codes[GOOD_ROWS])
    for row in FAILED_ROWS:
        empty = group["features"][row]
        assert np.isnan(empty).all() if known.step is None else (empty == layout.INT8_NO_DATA).all()
    for name, values in arrays(known).items():
        assert np.array_equal(group[name][:], values)
    assert ("step" in group) == (known.step is not None)


def test_members_are_found_without_a_listing(known: KnownStore) -> None:
    # Listing would warn of the tables beside the arrays.
    names = {name for name, _ in zarr.open_group(known.uri, mode="r").members(max_depth=None)}
    assert names == {"pca", "features", *arrays(known)}


def test_the_root_holds_all_documents_as_they_lie_below(known: KnownStore) -> None:
    folder = Path(known.uri)
    consolidated = json.loads((folder / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    below = {path.parent for path in folder.rglob("zarr.json")} - {folder}
    assert {str(path.relative_to(folder)) for path in below} == set(consolidated)
    for name, document in consolidated.items():
        assert document == json.loads((folder / name / "zarr.json").read_text())


def make_old(folder: Path) -> None:
    """Take out of a store's documents what stores of before did not have."""
    for path in folder.rglob("zarr.json"):
        document = json.loads(path.read_text())
        document.pop("consolidated_metadata", None)
        if document["node_type"] == "array":
            document["attributes"] = {}
            if path.parent.name != "features":
                document.pop("dimension_names")
        path.write_text(json.dumps(document, indent=2))


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_stores_of_before_still_open(tmp_path: Path, dtype: str) -> None:
    known = make_store(str(tmp_path / "store"), dtype)
    make_old(tmp_path / "store")
    store = FeatureStore(known.uri)
    for row in GOOD_ROWS:
        assert np.array_equal(store.read_codes(row), known.codes[row])
    assert store.components.shape == (K, C)
    for name, values in arrays(known).items():
        assert np.array_equal(store.array(name), values.astype(np.float32))
    assert (store.layout.shard_rows, store.layout.dtype) == (SHARD_ROWS, dtype)
    assert np.array_equal(zarr.open_group(known.uri, mode="r")["features"][:][GOOD_ROWS], known.codes[GOOD_ROWS])


READ_WITH_OLDEST = """
import sys, numpy as np, pyarrow, zarr
from densefeat import FeatureStore
store, expected = FeatureStore(sys.argv[1]), np.load(sys.argv[2])
for row in np.flatnonzero(np.isfinite(expected).all((1, 2, 3))):
    np.testing.assert_array_equal(store.read(int(row)), expected[row])
assert store.sample(0, [(5, 5)], coordinates="image").shape == (1, store.shape[0])
assert store.index["status"].to_pylist().count("ok") == len(store.keys) - 2
zarr.open_group(sys.argv[1], mode="r")["features"][0]
print(pyarrow.__version__, zarr.__version__, np.__version__)
"""


@pytest.mark.slow  # installs packages
def test_the_oldest_dependencies_read_a_store(known: KnownStore, tmp_path: Path) -> None:
    """A store that today's libraries wrote, read with the lower bounds that the package declares, and nothing else."""
    root = Path(__file__).parents[3]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = [requirement.replace(">=", "==") for requirement in declared]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "oldest"], check=True)
    python = tmp_path / "oldest" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *oldest], check=True)
    np.save(tmp_path / "expected.npy", expected_floats(known))
    command = [python, "-c", READ_WITH_OLDEST, known.uri, tmp_path / "expected.npy"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == next(r for r in oldest if r.startswith("pyarrow")).partition("==")[2] + ".0.0"
