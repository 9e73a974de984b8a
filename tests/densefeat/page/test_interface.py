"""The HTTP interface of the page."""

import io
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from starlette.testclient import TestClient

from densefeat import FeatureStore
from densefeat.page import create_app
from densefeat.page.cache import ByteCache
from densefeat.page.features import Features, segments
from densefeat.page.listing import matching_rows, rows_with_text
from densefeat.page.sample import Sample
from densefeat.storage.objects import Objects
from pipeline.store.retirement import retire
from tests.densefeat.page.stores import MISSING_ROW, photographed_store
from tests.helpers.stores import FAILED_ROWS, ROWS, H, K, W, make_store, set_up_store, write_known_shard

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return photographed_store(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def client(uri: str) -> TestClient:
    return TestClient(create_app(uri), base_url=ADDRESS)


def test_the_wall_filters_and_pages(client: TestClient) -> None:
    assert client.get("/api/rows").json()["total"] == ROWS
    failed = client.get("/api/rows?status=failed").json()
    assert [one["row"] for one in failed["rows"]] == list(FAILED_ROWS)
    assert failed["rows"][0]["error"] == "image file is truncated"
    assert [one["row"] for one in client.get("/api/rows?label=1&limit=2&offset=1").json()["rows"]] == [4, 7]
    assert [one["key"] for one in client.get("/api/rows?q=/010.JPG").json()["rows"]] == ["class/010.jpg"]
    assert client.get("/api/rows?limit=x").status_code == 400


def test_heat_is_the_cosine_with_the_selected_pixel(uri: str, client: TestClient) -> None:
    store = FeatureStore(uri)
    query, other = store.read(0)[:, 3, 6], store.read(4)
    cosines = np.einsum("k,khw->hw", query, other) / np.linalg.norm(query) / np.linalg.norm(other, axis=0)
    heat = np.frombuffer(client.get("/api/heat/4?from=0&point=6.2,3.9").content, np.uint8).reshape(H, W)
    assert np.abs(heat - 255 * np.clip(cosines, 0, 1)).max() <= 0.51
    own = np.frombuffer(client.get("/api/heat/0?from=0&box=6,3,7,4").content, np.uint8).reshape(H, W)
    assert own[3, 6] == 255
    for bad in ("point=1", "point=nan,1", "box=1,2,3", ""):
        assert client.get(f"/api/heat/0?from=0&{bad}").status_code == 400


def test_other_rows_are_ranked_by_their_best_place(uri: str, client: TestClient) -> None:
    for _ in range(100):
        found = client.get("/api/similar?from=0&point=6.2,3.9").json()
        if found["sample"]["complete"]:
            break
        time.sleep(0.05)
    store = FeatureStore(uri)
    query = store.read(0)[:, 3, 6] / np.linalg.norm(store.read(0)[:, 3, 6])
    rows = [row for row in range(1, ROWS) if row not in FAILED_ROWS]
    best = {
        row: float((query @ (f := store.read(row).reshape(K, -1)) / np.linalg.norm(f, axis=0)).max()) for row in rows
    }
    assert [one["row"] for one in found["matches"]] == sorted(rows, key=lambda row: -best[row])
    assert found["matches"][0]["cosine"] == pytest.approx(max(best.values()), abs=1e-5)
    assert len(client.get("/api/nearest/0").json()["matches"]) == len(rows)


def test_colours_have_one_scale_for_all_rows(uri: str, client: TestClient) -> None:
    store = FeatureStore(uri)
    rows = [row for row in range(ROWS) if row not in FAILED_ROWS]
    pictures = {row: np.asarray(Image.open(io.BytesIO(client.get(f"/api/colours/{row}").content))) for row in rows}
    first = np.concatenate([store.read(row)[0].reshape(-1) for row in rows])
    red = np.concatenate([pictures[row][..., 0].reshape(-1) for row in rows])
    assert pictures[0].shape == (H, W, 3)
    assert (np.diff(red[np.argsort(first, kind="stable")].astype(int)) >= 0).all()


def test_components_and_segments(client: TestClient) -> None:
    assert client.get(f"/api/component/0?component={K - 1}").headers["content-type"] == "image/png"
    assert client.get(f"/api/component/0?component={K}").status_code == 400
    picture = np.asarray(Image.open(io.BytesIO(client.get("/api/segments/0?count=3").content)))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 3


def test_segments_find_what_differs(uri: str) -> None:
    seen = Features(FeatureStore(uri)).seen(0)
    codes = np.zeros((K, H, W), np.int8)
    codes[0, :, :4], codes[1, :, 4:] = 100, 100
    halves = type(seen)(codes.reshape(K, -1), np.ones(K, np.float32), np.full(H * W, 0.01, np.float32), (H, W))
    labels = segments(halves, 2)
    assert len(set(labels[:, :4].reshape(-1))) == len(set(labels[:, 4:].reshape(-1))) == 1
    assert labels[0, 0] != labels[0, -1]


def test_photographs_are_cut_as_the_features_are(client: TestClient) -> None:
    answer = client.get("/api/photograph/0?size=120")
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.size == (100, 120)  # 12 × 10 features
    assert picture.mode == "RGBA"  # shifted by (4, 2): the rest is padding
    assert picture.getpixel((99, 119))[3] == 0
    assert picture.getpixel((5, 5))[3] == 255


def test_a_missing_photograph_is_a_404_with_its_reason(client: TestClient) -> None:
    answer = client.get(f"/api/photograph/{MISSING_ROW}")
    assert answer.status_code == 404
    assert "no such file" in answer.json()["error"]
    assert client.get(f"/api/colours/{MISSING_ROW}").status_code == 200


def test_a_retired_photograph_is_not_shown(tmp_path: Path) -> None:
    uri = photographed_store(tmp_path)
    assert TestClient(create_app(uri), base_url=ADDRESS).get("/api/photograph/1").status_code == 200
    retire(Objects(uri), [1], "consent withdrawn")
    client = TestClient(create_app(uri), base_url=ADDRESS)
    answer = client.get("/api/photograph/1")
    assert answer.status_code == 404
    assert "is retired: consent withdrawn" in answer.json()["error"]
    assert client.get("/api/colours/1").status_code == 404
    assert [one["row"] for one in client.get("/api/rows?status=retired").json()["rows"]] == [1]
    assert client.get("/api/photograph/0").status_code == 200


def test_a_photograph_that_is_no_image(tmp_path: Path, uri: str) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "000.jpg").write_bytes(b"not an image")
    answer = TestClient(create_app(uri, images=str(tmp_path)), base_url=ADDRESS).get("/api/photograph/0")
    assert answer.status_code == 404
    assert "cannot identify image" in answer.json()["error"]


def test_failed_rows_say_why(client: TestClient) -> None:
    answer = client.get(f"/api/colours/{FAILED_ROWS[0]}")
    assert (answer.status_code, answer.json()["status"]) == (404, "corrupt")
    assert "truncated" in answer.json()["error"]
    assert client.get(f"/api/image/{ROWS}").status_code == 404
    assert client.get("/api/image/-1").status_code == 404


def test_figures(client: TestClient) -> None:
    found = client.get("/api/figures").json()
    assert found["images"] == ROWS - len(FAILED_ROWS)
    assert found["failures"] == [
        {"status": "corrupt", "error": "image file is truncated", "rows": 2, "first": FAILED_ROWS[0]}
    ]
    assert found["shards"] == 3
    assert sum(found["explained_variance_ratio"]) == pytest.approx(0.8)


def test_rows_of_shards_that_are_not_done(tmp_path: Path) -> None:
    store = set_up_store(str(tmp_path / "store"))
    write_known_shard(store, 0)
    client = TestClient(create_app(store.uri), base_url=ADDRESS)
    assert client.get("/api/colours/10").json()["status"] == "pending"
    assert client.get("/api/colours/0").status_code == 200


@pytest.mark.s3
def test_a_store_and_photographs_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    store = make_store(f"{s3_bucket}/store")
    folder = tmp_path / "photographs" / "class"
    photographed_store(tmp_path)
    Objects(f"{s3_bucket}/photographs").put("class/000.jpg", (folder / "000.jpg").read_bytes())
    client = TestClient(create_app(store.uri, images=f"{s3_bucket}/photographs"), base_url=ADDRESS)
    assert client.get("/api/photograph/0").status_code == 200
    assert client.get("/api/photograph/1").status_code == 404
    assert len(client.get("/api/heat/4?from=0&point=1,1").content) == H * W


def test_the_sample_keeps_to_its_size(uri: str) -> None:
    features = Features(FeatureStore(uri))
    sample = Sample(features, max_images=2)
    for row in (0, 1, 3):
        sample.add(row, features.seen(row))
    query = features.seen(0).at((0, 0, 1, 1))
    assert {match.row for match in sample.like_region(query)} == {1, 3}


def test_a_sample_may_grow_while_it_is_ranked(uri: str) -> None:
    features = Features(FeatureStore(uri))
    rows = [int(row) for row in features.ok_rows]
    query = features.seen(rows[0])
    direction = query.at((0, 0, *query.shape))
    expected = Sample(features)
    for row in rows:
        expected.add(row, features.seen(row))
    by_region = {match.row: match for match in expected.like_region(direction)}
    by_image = {match.row: match for match in expected.like_image(query)}
    assert len(by_region) == len(by_image) == len(rows)
    for _ in range(100):
        sample = Sample(features)
        sample.start()
        complete = False
        while not complete:
            complete = sample.complete.is_set()
            for found, true in ((sample.like_region(direction), by_region), (sample.like_image(query), by_image)):
                assert [match.cosine for match in found] == pytest.approx([true[match.row].cosine for match in found])
                assert not complete or [match.row for match in found] == list(true)


def test_a_cache_keeps_to_its_bytes() -> None:
    cache: ByteCache[bytes] = ByteCache(10, len)
    for key in "abc":
        cache.get(key, lambda: b"1234")
    assert (len(cache), cache.nbytes) == (2, 8)
    assert cache.get("a", lambda: b"again") == b"again"
    assert cache.get("c", lambda: b"not made") == b"1234"


def test_a_million_rows_are_filtered_in_arrow() -> None:
    rows = 1_000_000
    keys = pa.array([f"class/{row:x}" for row in range(rows)])
    index = pa.table({"key": keys, "status": pa.array(np.where(np.arange(rows) % 1000, "ok", "corrupt")),
                      "label": pa.array(np.arange(rows) % 10)})  # fmt: skip
    with_text = rows_with_text(index["key"], "9A999")
    assert with_text.tolist() == [row for row in range(rows) if "9a999" in f"{row:x}"]
    found = matching_rows(index, with_text, status="ok", label=9)
    assert found.tolist() == [row for row in with_text if row % 10 == 9 and row % 1000]
    assert matching_rows(index, status="failed").tolist() == list(range(0, rows, 1000))
    assert matching_rows(index, label=3, status="corrupt").tolist() == []
    assert len(matching_rows(index)) == rows
