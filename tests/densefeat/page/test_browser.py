"""The page in a headless Chromium."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from densefeat import FeatureStore
from tests.densefeat.page.serving import NEEDS_CHROMIUM, serving
from tests.densefeat.page.stores import MISSING_ROW, photographed_store
from tests.helpers.stores import FAILED_ROWS, ROWS, H, W

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Addresses of the page of a finished and of an unfinished store."""
    finished = photographed_store(tmp_path_factory.mktemp("finished"))
    pending = photographed_store(tmp_path_factory.mktemp("pending"), finished=False)
    with serving(finished) as one, serving(pending) as other:
        yield {"uri": finished, "finished": one, "pending": other}


@pytest.fixture
def page(browser: Any, served: dict[str, Any]) -> Iterator[Page]:
    """A page whose errors fail the test, and which may ask nobody but the server."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    opened: Page = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    context.close()
    assert not errors
    assert asked
    assert all(url.startswith((served["finished"], served["pending"])) for url in asked)


def test_a_click_shows_what_is_like_the_pixel(page: Page, served: dict[str, Any]) -> None:
    page.goto(f"{served['finished']}/image/0")
    stage = page.locator("#stage")
    stage.click(position=_at(stage, 6.5, 3.5))
    canvas = page.locator("#heat[data-selection='point=6.5,3.5']")
    expect(canvas).to_be_visible()
    shown = np.array(
        page.evaluate("[...document.querySelector('#heat').getContext('2d').getImageData(0,0,10,12).data]")
    )
    store = FeatureStore(served["uri"])
    query, features = store.read(0)[:, 3, 6], store.read(0)
    cosines = np.einsum("k,khw->hw", query, features) / np.linalg.norm(features, axis=0)
    brightness = shown.reshape(H, W, 4)[..., :3].sum(axis=-1)
    assert np.unravel_index(brightness.argmax(), (H, W)) == np.unravel_index(cosines.argmax(), (H, W)) == (3, 6)
    assert "point=6.5,3.5" in page.url
    expect(page.get_by_role("heading", name="The same in other images")).to_be_visible()
    expect(page.locator(".others .tile")).to_have_count(ROWS - len(FAILED_ROWS) - 1)
    page.keyboard.press("Escape")
    expect(page.locator("#heat")).to_be_hidden()
    page.go_back()
    expect(page.locator("#heat[data-selection='point=6.5,3.5']")).to_be_visible()


def test_a_dragged_box_selects_a_region(page: Page, served: dict[str, Any]) -> None:
    page.goto(f"{served['finished']}/image/0")
    stage = page.locator("#stage")
    frame = stage.bounding_box()
    assert frame is not None
    start, end = _at(stage, 2.0, 3.0), _at(stage, 6.0, 8.0)
    page.mouse.move(frame["x"] + start["x"], frame["y"] + start["y"])
    page.mouse.down()
    page.mouse.move(frame["x"] + end["x"], frame["y"] + end["y"], steps=4)
    page.mouse.up()
    expect(page.locator("#heat[data-selection='box=2.0,3.0,6.0,8.0']")).to_be_visible()


def test_failed_rows_show_their_reason(page: Page, served: dict[str, Any]) -> None:
    page.goto(served["finished"])
    expect(page.locator(f".tile[data-row='{FAILED_ROWS[0]}']")).to_contain_text("corrupt: image file is truncated")
    page.get_by_label("Status").select_option("corrupt")
    expect(page.locator(".tile")).to_have_count(len(FAILED_ROWS))
    assert "status=corrupt" in page.url
    page.locator(".tile").first.click()
    expect(page.locator(".notice")).to_contain_text("image file is truncated")
    page.go_back()
    expect(page.locator(".tile")).to_have_count(len(FAILED_ROWS))


def test_a_missing_photograph_leaves_the_features(page: Page, served: dict[str, Any]) -> None:
    page.goto(f"{served['finished']}/image/{MISSING_ROW}")
    expect(page.locator("#no-photograph")).to_contain_text("no such file")
    expect(page.locator("img.over")).to_be_visible()
    assert page.locator("img.over").evaluate("image => image.decode().then(() => image.naturalWidth)") == W


def test_a_store_that_is_being_made(page: Page, served: dict[str, Any]) -> None:
    page.goto(served["pending"])
    expect(page.locator(".notice")).to_contain_text(f"4 of {ROWS} images are done")
    page.goto(f"{served['pending']}/image/{ROWS - 1}")
    expect(page.locator(".notice")).to_contain_text("not done yet")
    page.goto(f"{served['pending']}/figures")
    expect(page.locator("main")).to_contain_text("Of the 3 images in 1 shard that are done.")
    expect(page.locator("tr", has_text="write")).to_contain_text("ms an image")


def test_the_keyboard(page: Page, served: dict[str, Any]) -> None:
    page.goto(f"{served['finished']}/image/1")
    expect(page.locator("h1")).to_have_text("class/001.jpg")
    page.keyboard.press("4")
    expect(page.locator("button[data-value=segments]")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("ArrowRight")
    expect(page.locator("h1")).to_have_text("class/003.jpg")  # row 2 failed
    assert page.url.endswith("/image/3?layer=segments")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator(".wall")).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type("010")
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(1)


def test_dark_and_light(page: Page, served: dict[str, Any]) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto(served["finished"])
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(19, 20, 22)"
    page.locator("#theme").click()
    assert page.evaluate(background) == "rgb(251, 250, 248)"
    page.reload()
    assert page.evaluate(background) == "rgb(251, 250, 248)"


@pytest.mark.parametrize("path", ["/", "/image/0", f"/image/{FAILED_ROWS[0]}", "/figures"])
def test_a_phone_needs_no_sideways_scrolling(page: Page, served: dict[str, Any], path: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(served["finished"] + path)
    expect(page.locator("main[data-view]")).to_be_visible()
    time.sleep(0.3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def _at(stage: Any, x: float, y: float) -> dict[str, float]:
    """Feature pixels as a position within the stage."""
    frame = stage.bounding_box()
    return {"x": x * frame["width"] / W, "y": y * frame["height"] / H}
