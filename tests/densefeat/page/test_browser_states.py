"""Unusual stores, addresses and moments in a headless Chromium."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from densefeat import layout
from tests.densefeat.page.serving import NEEDS_CHROMIUM, serving
from tests.densefeat.page.stores import photograph, references, written_store
from tests.helpers.stores import make_store

pytestmark = NEEDS_CHROMIUM

KEYS = (
    "<img src=x onerror=alert(1)>/a\"b'c&amp;.jpg", "ünïcödé/图像.jpg", "line\nbreak\ttab.jpg",
    "a%2Fb%00?x=1#frag&y.jpg",
    "../../etc/passwd", "x" * 700 + ".jpg", "", "\u202egnp.exe", "</script><script>alert(2)</script>",
)  # fmt: skip


def store(folder: Path, shape: tuple[int, int, int], keys: tuple[str, ...], **options: Any) -> str:
    """A store with photographs in ``folder``."""
    size = (2 * shape[2], 2 * shape[1])
    uris = [str(folder / f"{row}.jpg") for row in range(len(keys))]
    for row, uri in enumerate(uris):
        Path(uri).write_bytes(photograph(row, size=size))
    return written_store(str(folder / "store"), references(keys, uris), shape, **options)


def shows_pixels(page: Page, selector: str) -> None:
    expect(page.locator(selector).first).to_be_visible()
    width = "image => image.decode().then(() => image.naturalWidth)"
    assert page.locator(selector).first.evaluate(width) > 0


def eventually(page: Page, condition: str) -> None:
    """Wait for a condition; the page's policy allows no `Page.wait_for_function`."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


@pytest.mark.parametrize(
    ("shape", "rows", "dtype"),
    [((1, 8, 8), 3, "int8"), ((2, 8, 8), 3, "int8"), ((3, 28, 28), 5, "int8"), ((8, 1, 1), 3, "int8"),
     ((8, 12, 10), 1, "int8"), ((8, 12, 20), 5, "float16"), ((8, 8, 64), 3, "int8"), ((8, 64, 8), 3, "int8")],
)  # fmt: skip
def test_stores_of_all_shapes(page: Page, tmp_path: Path, shape: tuple[int, int, int], rows: int, dtype: str) -> None:
    uri = store(tmp_path, shape, tuple(f"{row}.jpg" for row in range(rows)), dtype=dtype)
    with serving(uri) as address:
        page.goto(address)
        expect(page.get_by_text("1 image" if rows == 1 else f"{rows} images", exact=True)).to_be_visible()
        shows_pixels(page, ".tile img")
        page.locator(".tile").first.click()
        stage = page.locator("#stage")
        for layer in ("photograph", "features", "component", "segments"):
            page.locator(f"button[data-value={layer}]").click()
            shows_pixels(page, "#stage img" if layer == "photograph" else "#stage img.over")
        stage.click()
        expect(page.locator("#heat[data-selection]")).to_be_visible()
        expect(page.locator(".others .tile")).to_have_count(rows - 1)
        if rows == 1:
            expect(page.locator("aside")).to_contain_text("No other image has features.")
        frame = stage.bounding_box()
        assert frame is not None
        assert frame["y"] + frame["height"] <= 800
        assert frame["width"] / frame["height"] == pytest.approx(shape[2] / shape[1], rel=0.02)
        page.goto(f"{address}/figures")
        expect(page.locator("main")).to_contain_text("No image failed.")


def test_a_store_without_features(page: Page, tmp_path: Path) -> None:
    keys = ("a.jpg", "b.jpg", "c.jpg")
    with serving(store(tmp_path, (8, 8, 8), keys, failed=range(3))) as address:
        page.goto(address)
        expect(page.locator(".tile.bad, .tile .bad")).to_have_count(3)
        page.locator(".tile").last.click()
        expect(page.locator(".notice")).to_contain_text("corrupt: cut off at byte 2")
        page.goto(f"{address}/figures")
        expect(page.locator("main")).to_contain_text("No image has features.")
        expect(page.locator("main")).not_to_contain_text("times smaller")


def test_keys_are_texts(page: Page, tmp_path: Path) -> None:
    with serving(store(tmp_path, (8, 12, 10), KEYS)) as address:
        for width in (1200, 360):
            page.set_viewport_size({"width": width, "height": 740})
            for row, key in enumerate(KEYS):
                page.goto(f"{address}/image/{row}")
                expect(page.locator("h1")).to_have_text(key, use_inner_text=False)
                expect(page.locator(".others .tile")).to_have_count(len(KEYS) - 1)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        for text, found in (("<IMG", 1), ("图", 1), ("%2f", 1), ("</script>", 1), ("ÜNÏ", 1), ("\\", 0)):
            page.goto(address)
            page.get_by_label("Search by key").fill(text)
            page.keyboard.press("Enter")
            expect(page.get_by_text(f"{found} of {len(KEYS)} images")).to_be_visible()
            page.reload()
            expect(page.locator(".tile")).to_have_count(found)


@pytest.mark.parametrize(
    ("address", "pressed"),
    [("component=99&layer=component", "component"), ("segments=-3&layer=segments", "segments"),
     ("segments=x&component=y&opacity=z", "features"), ("layer=toString", "features"), ("point=a,b", "features"),
     ("box=1,2,3", "features"), ("box=1,,3,4", "features"), ("opacity=0&layer=photograph", "photograph")],
)  # fmt: skip
def test_an_address_with_other_values_shows_the_image(page: Page, tmp_path: Path, address: str, pressed: str) -> None:
    refused: list[str] = []
    page.on("response", lambda response: refused.append(response.url) if response.status >= 400 else None)
    with serving(store(tmp_path, (8, 12, 10), ("a.jpg", "b.jpg"))) as place:
        page.goto(f"{place}/image/0?{address}")
        expect(page.locator(f"button[data-value={pressed}]")).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".others .tile")).to_have_count(1)
        expect(page.locator(".notice")).to_have_count(0)
    assert not refused


@pytest.mark.parametrize("number", ["99", "0", "-1", "1.7", "abc", "1e300"])
def test_pages_beyond_the_last(page: Page, tmp_path: Path, number: str) -> None:
    keys = tuple(f"{row}.jpg" for row in range(100))
    with serving(written_store(str(tmp_path / "store"), references(keys, keys), (4, 4, 4), shard_rows=100)) as address:
        page.goto(f"{address}/?page={number}")
        expect(page.locator(".tile")).to_have_count(4 if number in ("99", "1e300") else 96)
        page.goto(f"{address}/?page=2&q=1.jpg")
        expect(page.locator(".tile")).to_have_count(10)


def test_the_back_button_leads_to_the_same_place(page: Page, tmp_path: Path) -> None:
    keys = tuple(f"{row}.jpg" for row in range(100))
    with serving(written_store(str(tmp_path / "store"), references(keys, keys), (4, 4, 4), shard_rows=100)) as address:
        page.goto(f"{address}/?show=colours")
        page.locator(".tile").nth(80).scroll_into_view_if_needed()
        eventually(page, "history.state?.scroll > 500")
        before = page.evaluate("scrollY")
        page.locator(".tile").nth(80).click()
        expect(page.locator("h1")).to_have_text("80.jpg")
        assert page.evaluate("scrollY") == 0
        page.go_back()
        expect(page.locator(".tile")).to_have_count(96)
        eventually(page, f"scrollY === {before}")
        page.get_by_label("Next page").last.click()
        expect(page.locator(".tile")).to_have_count(4)
        eventually(page, "scrollY === 0")


def test_a_store_that_is_removed_while_its_page_is_open(page: Page, tmp_path: Path) -> None:
    uri = store(tmp_path, (8, 12, 10), tuple(f"{row}.jpg" for row in range(8)))
    with serving(uri) as address:
        page.goto(f"{address}/?show=photograph")
        shows_pixels(page, ".tile img")
        shutil.rmtree(uri)
        page.locator(".tile").nth(1).click()
        expect(page.locator("#no-features")).to_contain_text("The features cannot be shown")
        page.goto(address)
        expect(page.get_by_text("features cannot be read")).to_have_count(8)
        instead = page.get_by_text("features cannot be read").first
        instead.hover()
        expect(instead).to_have_attribute("title", re.compile("is missing"))


def test_a_damaged_shard_takes_no_other_image_along(page: Page, tmp_path: Path) -> None:
    uri = store(tmp_path, (8, 12, 10), tuple(f"{row}.jpg" for row in range(8)))
    shard = Path(uri) / layout.shard_key(0)
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with serving(uri) as address:
        page.goto(f"{address}/image/4")
        shows_pixels(page, "#stage img.over")
        expect(page.locator(".notice")).to_have_count(0)
        page.goto(f"{address}/image/0")
        expect(page.locator("#no-features")).to_contain_text("damaged")


def test_a_page_whose_command_has_ended(page: Page, tmp_path: Path) -> None:
    with serving(make_store(str(tmp_path / "store")).uri) as address:
        page.goto(address)
        expect(page.locator(".tile")).to_have_count(11)
    page.locator(".tile").first.click()
    expect(page.locator(".notice")).to_contain_text("is the command still running?")


def test_a_wrong_token(page: Page, tmp_path: Path) -> None:
    uri = make_store(str(tmp_path / "store")).uri
    with serving(uri, token="right") as address:
        page.goto(f"{address}/?token=wrong")
        expect(page.locator("body")).to_contain_text("open the address that the command printed")
        page.goto(f"{address}/image/3?token=right&layer=segments")
        expect(page.locator("h1")).to_have_text("class/003.jpg")
        assert page.url == f"{address}/image/3?layer=segments"
        page.context.clear_cookies()
        page.keyboard.press("ArrowRight")
        expect(page.locator(".notice")).to_contain_text("open the address that the command printed")
