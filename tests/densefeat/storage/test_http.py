"""Stores over http(s), from servers that differ in what they can."""

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from densefeat import FeatureStore, MissingFeatures, StorageUnavailable, StoreError, TorchFeatures, layout
from densefeat.storage.objects import Objects
from densefeat.storage.retries import is_transient
from tests.helpers.servers.http_servers import Server, serve
from tests.helpers.stores import FAILED_ROWS, ROWS, SHARD_ROWS, KnownStore, make_store, set_up_store, write_known_shard

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("served") / "store"))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("listing", [True, False])
@pytest.mark.parametrize("absent", [404, 403])
def test_a_finished_store_reads_the_same_from_any_server(
    known: KnownStore, ranges: bool, listing: bool, absent: int
) -> None:
    with serve(known.uri, ranges=ranges, listing=listing, absent=absent) as server:
        store, local = FeatureStore(server.uri + "/"), FeatureStore(known.uri)
        for row in GOOD_ROWS:
            assert np.array_equal(store.read(row), local.read(row))
        assert store.index.equals(local.index)
        assert not store.has_embedding
        assert np.array_equal(store.components, local.components)
        assert np.array_equal(store.mean, local.mean)
        assert np.array_equal(store.sample(3, [[1, 2]]), local.sample(3, [[1, 2]]))
        with pytest.raises(MissingFeatures, match="corrupt"):
            store.read(FAILED_ROWS[0])
        assert not [request for request in server.requests if request.endswith("/")], "nothing is listed"


def test_a_row_is_one_request_of_its_bytes(known: KnownStore) -> None:
    with serve(known.uri) as server:
        store = FeatureStore(server.uri)
        assert store.step is not None
        store.read(0)
        before, sent = len(server.requests), server.sent
        store.read(5)
        assert server.requests[before:] == [f"GET /{layout.shard_key(1)}"]
        assert server.sent - sent == store.index["chunk_nbytes"][5].as_py()


def test_a_server_without_ranges_is_told_of_once(known: KnownStore, caplog: pytest.LogCaptureFixture) -> None:
    with serve(known.uri, ranges=False) as server, caplog.at_level(logging.WARNING, "densefeat.storage.http"):
        store = FeatureStore(server.uri)
        for row in GOOD_ROWS:
            store.read(row)
    assert [record.message for record in caplog.records if "does not support range requests" in record.message] == [
        caplog.records[0].message
    ]


@pytest.mark.parametrize("ranges", [True, False])
@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 350_000), length=st.integers(0, 350_000))
def test_a_range_is_the_right_bytes(big: Server, big_without: Server, ranges: bool, start: int, length: int) -> None:
    server = big if ranges else big_without
    data = (server.folder / "object").read_bytes()
    assert Objects(server.uri).get_range("object", start, start + length) == data[start : start + length]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("big")
    (folder / "object").write_bytes(np.random.default_rng(0).bytes(300_000))
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="module")
def big_without(big: Server) -> Iterator[Server]:
    with serve(big.folder, ranges=False) as server:
        yield server


def test_without_ranges_only_the_range_is_held(tmp_path: Path) -> None:
    # 200 MB behind it are neither transferred nor kept; a server that is read to the end would send them.
    with (tmp_path / "object").open("wb") as file:
        file.truncate(200_000_000)
    with serve(tmp_path, ranges=False) as server:
        assert Objects(server.uri).get_range("object", 1000, 1010) == bytes(10)
        assert server.sent < 200_000_000


def test_an_unfinished_store_is_read_without_listing(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    write_known_shard(known, 1)
    with serve(known.uri) as server:
        store = FeatureStore(server.uri)
        assert np.array_equal(store.read_codes(SHARD_ROWS), known.codes[SHARD_ROWS])
        with pytest.raises(MissingFeatures, match="not done yet"):
            store.read(0)
    with serve(known.uri, absent=403) as server, pytest.raises(StoreError, match=r"cannot tell which shards .* 403"):
        FeatureStore(server.uri).read(SHARD_ROWS)


@pytest.mark.parametrize("key", ["zarr.json", "features/zarr.json", "index.parquet", "manifest.parquet", "step/c/0"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_fails_is_not_a_damaged_store(
    known: KnownStore, key: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("densefeat.storage.objects.PATIENCE_S", 0.1)
    with (
        serve(known.uri, failing={f"/{key}": status}) as server,
        pytest.raises(StorageUnavailable, match=str(status)) as caught,
    ):
        FeatureStore(server.uri).read(0)
    assert isinstance(caught.value.__cause__, OSError)
    assert is_transient(caught.value.__cause__)


@pytest.mark.parametrize("status", [401, 403])
def test_no_permission_is_said(known: KnownStore, status: int) -> None:
    with (
        serve(known.uri, failing={"/zarr.json": status}) as server,
        pytest.raises(PermissionError, match=rf"zarr\.json.* {status}"),
    ):
        FeatureStore(server.uri)


def test_no_store_at_an_address(tmp_path: Path) -> None:
    with serve(tmp_path) as server, pytest.raises(StoreError, match=r"not a feature store: it has no zarr\.json"):
        FeatureStore(server.uri)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_that_is_cut_off_is_an_error(known: KnownStore, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densefeat.storage.objects.PATIENCE_S", 0.1)
    with serve(known.uri, ranges=ranges) as server:
        store = FeatureStore(server.uri)
        store.index, store.step  # noqa: B018 - read before the server gets worse
        server.cut_off = 20
        with pytest.raises(StorageUnavailable, match="20 of") as caught:
            store.read(5)
        assert is_transient(caught.value.__cause__)


def test_what_lies_beyond_the_object_is_damage(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    shard = Path(known.uri) / layout.shard_key(2)
    shard.write_bytes(shard.read_bytes()[:10])
    with serve(known.uri) as server:
        for row in (9, 10):
            with pytest.raises(StoreError, match=f"row {row} .* damaged: .* bytes are recorded"):
                FeatureStore(server.uri).read(row)


def test_headers_of_the_storage_options_are_sent(known: KnownStore) -> None:
    with serve(known.uri) as server:
        store = FeatureStore(server.uri, {"headers": {"Authorization": "Bearer x"}})
        assert store.read(5).shape == store.shape
        assert server.authorizations == {"Bearer x"}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataset_in_forked_workers(known: KnownStore) -> None:
    with serve(known.uri) as server:
        dataset = TorchFeatures(server.uri)
        first = dataset[0]["features"]
        context = multiprocessing.get_context("fork")
        loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
        batches = list(loader)
    assert torch.cat([batch["row"] for batch in batches]).tolist() == GOOD_ROWS
    assert torch.equal(batches[0]["features"][0], first)


def test_many_threads(known: KnownStore) -> None:
    with serve(known.uri) as server, ThreadPoolExecutor(8) as pool:
        store, local = FeatureStore(server.uri), FeatureStore(known.uri)
        for row, features in zip(GOOD_ROWS * 5, pool.map(store.read, GOOD_ROWS * 5), strict=True):
            assert np.array_equal(features, local.read(row))


@pytest.mark.parametrize("name", ["x#1.png", "q?.png", "50%20.png", "a b.png", "ü+&=.png", "a%2Fb.png", "x"])
def test_names_are_not_parts_of_urls(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"another")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"right")
    with serve(str(tmp_path)) as server:
        objects = Objects(server.uri)
        assert objects.get(f"folder/{name}") == b"right"
        assert objects.get_range(f"folder/{name}", 1, 3) == b"ig"
        assert objects.exists(f"folder/{name}")
        assert not objects.exists(f"folder/{name}#")
