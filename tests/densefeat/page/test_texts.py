"""Images compared with texts: the HTTP interface, and the page in a headless Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect
from starlette.testclient import TestClient

from densefeat import FeatureStore, command_line
from densefeat.errors import DensefeatError
from densefeat.page import create_app
from tests.densefeat.page.serving import NEEDS_CHROMIUM, serving
from tests.densefeat.page.stores import photographed_store, replace_columns
from tests.helpers.stores import FAILED_ROWS, ROWS, C, H, W, make_store

ADDRESS = "http://127.0.0.1:8000"
NAMES = ("a dog & a cat", "図", "a/b?c=d#e", "<b>x</b>")
VECTORS = np.random.default_rng(3).normal(size=(len(NAMES), C))
HEAT = "[...document.querySelector('#heat').getContext('2d').getImageData(0,0,10,12).data]"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return photographed_store(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("texts") / "texts.npz"
    np.savez(file, names=np.array(NAMES), vectors=VECTORS)
    return str(file)


@pytest.fixture(scope="module")
def client(uri: str, texts: str) -> TestClient:
    return TestClient(create_app(uri, texts=texts), base_url=ADDRESS)


def test_the_page_knows_the_names(client: TestClient, uri: str) -> None:
    assert client.get("/api/store").json()["texts"] == list(NAMES)
    assert TestClient(create_app(uri), base_url=ADDRESS).get("/api/store").json()["texts"] == []


@pytest.mark.parametrize("number", range(len(NAMES)))
@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_heat_is_the_similarity_from_least_to_greatest(client: TestClient, uri: str, number: int, row: int) -> None:
    expected = FeatureStore(uri).similarity(row, VECTORS[number])
    answer = client.get(f"/api/heat/{row}", params={"text": NAMES[number]})
    heat = np.frombuffer(answer.content, np.uint8).reshape(H, W)
    low, high = map(float, answer.headers["heat-range"].split())
    assert (low, high) == pytest.approx((expected.min(), expected.max()), abs=1e-5)
    assert np.abs(low + heat / 255 * (high - low) - expected).max() < (high - low) * 0.51 / 255
    assert heat.max() == 255 > heat.min() == 0


def test_padding_is_left_out(tmp_path: Path, texts: str) -> None:
    uri = make_store(str(tmp_path / "store")).uri
    replace_columns(uri, valid_box=[[2, 1, 9, 8]] * ROWS)
    answer = TestClient(create_app(uri, texts=texts), base_url=ADDRESS).get("/api/heat/0", params={"text": NAMES[0]})
    heat = np.frombuffer(answer.content, np.uint8).reshape(H, W)
    inside = FeatureStore(uri).similarity(0, VECTORS[0])[2:9, 1:8]
    assert heat[2:9, 1:8].max() == 255
    assert heat.sum() == heat[2:9, 1:8].sum()
    low, high = map(float, answer.headers["heat-range"].split())
    assert (low, high) == pytest.approx((inside.min(), inside.max()), abs=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_map_without_differences(tmp_path: Path, dtype: str) -> None:
    """Of the one pixel that is not padding."""
    uri = make_store(str(tmp_path / "store"), dtype).uri
    replace_columns(uri, valid_box=[[2, 1, 3, 2]] * ROWS)
    np.savez(tmp_path / "one.npz", one=VECTORS[0])
    client = TestClient(create_app(uri, texts=str(tmp_path / "one.npz")), base_url=ADDRESS)
    answer = client.get("/api/heat/0?text=one")
    assert set(answer.content) == {0}
    assert len(set(answer.headers["heat-range"].split())) == 1


def test_other_texts_and_rows_are_refused(client: TestClient, uri: str) -> None:
    answer = client.get("/api/heat/0?text=bird")
    assert answer.status_code == 400
    assert answer.json()["error"] == "there is no text 'bird': the page has 4 others (--texts)"
    plain = TestClient(create_app(uri), base_url=ADDRESS).get("/api/heat/0?text=bird")
    assert (plain.status_code, "the page has no texts" in plain.json()["error"]) == (400, True)
    assert client.get(f"/api/heat/{FAILED_ROWS[0]}", params={"text": NAMES[0]}).status_code == 404
    assert client.get(f"/api/heat/{ROWS}", params={"text": NAMES[0]}).status_code == 404


def test_a_file_that_does_not_fit_is_refused_at_the_start(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "long.npz", dog=np.ones(C + 1))
    np.save(tmp_path / "single.npy", np.ones((2, C)))
    with pytest.raises(ValueError, match=f"have {C + 1} channels, the features of .* {C}: .*--space head"):
        create_app(uri, texts=str(tmp_path / "long.npz"))
    with pytest.raises(DensefeatError, match="it is one array, without names"):
        create_app(uri, texts=str(tmp_path / "single.npy"))
    for file, words in (("long.npz", "channels"), ("single.npy", "without names"), ("none.npz", "none.npz")):
        with pytest.raises(SystemExit) as caught:
            command_line.main(["browse", uri, "--port", "0", "--texts", str(tmp_path / file)])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error


def test_a_store_that_is_replaced_by_one_of_other_channels(uri: str, texts: str) -> None:
    client = TestClient(create_app(uri, texts=texts), base_url=ADDRESS)
    page = client.app.routes[0].endpoint.__self__  # type: ignore[attr-defined]
    page.library.shown().store.__dict__["mean"] = np.ones(C + 2, np.float32)
    answer = client.get("/api/heat/0", params={"text": NAMES[0]})
    assert (answer.status_code, answer.json()["error"]) == (400, f"the texts have {C} channels, the features {C + 2}")


# --- In a browser ---


@pytest.fixture(scope="module")
def served(uri: str, texts: str) -> Iterator[str]:
    with serving(uri, texts=texts) as address:
        yield address


def brightest(page: Page) -> tuple[int, int]:
    """The feature pixel whose colour in the heat map is brightest."""
    colours = np.array(page.evaluate(HEAT)).reshape(H, W, 4)[..., :3].sum(axis=-1)
    y, x = np.unravel_index(colours.argmax(), (H, W))
    return int(y), int(x)


def hottest(uri: str, row: int, number: int) -> tuple[int, int]:
    y, x = np.unravel_index(FeatureStore(uri).similarity(row, VECTORS[number]).argmax(), (H, W))
    return int(y), int(x)


@NEEDS_CHROMIUM
@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_chosen_text_shows_its_heat_map(page: Page, served: str, uri: str, number: int) -> None:
    page.goto(f"{served}/image/0")
    expect(page.locator("#heat")).to_be_hidden()
    choice = page.get_by_label("Text", exact=True)
    expect(choice.locator("option")).to_have_text(["none", *NAMES])
    choice.select_option(NAMES[number])
    expect(page.locator("#heat")).to_be_visible()
    assert brightest(page) == hottest(uri, 0, number)
    similarity = FeatureStore(uri).similarity(0, VECTORS[number])
    expect(page.locator(".scale")).to_have_text(f"{similarity.min():.3f}{similarity.max():.3f}")
    page.reload()
    expect(page.locator("#heat")).to_be_visible()
    expect(choice).to_have_value(NAMES[number])
    choice.select_option("none")
    expect(page.locator("#heat")).to_be_hidden()
    assert "text=" not in page.url


@NEEDS_CHROMIUM
def test_a_text_goes_along_to_the_next_image_and_gives_way_to_a_pixel(page: Page, served: str, uri: str) -> None:
    page.goto(f"{served}/image/0")
    choice = page.get_by_label("Text", exact=True)
    choice.select_option(NAMES[1])
    expect(page.locator("#heat")).to_be_visible()
    page.get_by_label("Next image").click()
    expect(page.locator("h1")).to_have_text("class/001.jpg")
    expect(page.locator("#heat")).to_be_visible()
    expect(choice).to_have_value(NAMES[1])
    assert brightest(page) == hottest(uri, 1, 1)
    expect(page.get_by_role("heading", name="Nearest images")).to_be_visible()
    page.locator("#stage").click(position={"x": 50, "y": 50})
    expect(page.locator("#heat[data-selection^='point=']")).to_be_visible()
    expect(choice).to_have_value("")
    expect(page.locator(".scale")).to_have_text("unlikealike")
    page.go_back()
    expect(page.locator("#heat[data-selection^='text=']")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#heat")).to_be_hidden()
    expect(choice).to_have_value("")
    page.keyboard.press("1")
    expect(page.locator("button[data-value=photograph]")).to_have_attribute("aria-pressed", "true")


@NEEDS_CHROMIUM
def test_without_texts_and_with_unknown_ones_nothing_is_chosen(page: Page, served: str, uri: str) -> None:
    page.goto(f"{served}/image/0?text=bird")
    expect(page.locator(".others .tile")).not_to_have_count(0)
    expect(page.locator("#heat")).to_be_hidden()
    with serving(uri) as plain:
        page.goto(f"{plain}/image/0?text={json.dumps(NAMES[1])}")
        expect(page.locator(".others .tile")).not_to_have_count(0)
        expect(page.locator("#text")).to_have_count(0)


@NEEDS_CHROMIUM
def test_a_phone_needs_no_sideways_scrolling(page: Page, uri: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "long.npz", names=np.array(["long words " * 40]), vectors=VECTORS[:1])
    page.set_viewport_size({"width": 360, "height": 740})
    with serving(uri, texts=str(tmp_path / "long.npz")) as address:
        page.goto(f"{address}/image/0")
        expect(page.locator("#text")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
