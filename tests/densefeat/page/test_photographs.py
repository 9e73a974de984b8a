"""Photographs on the grid of their features: copies of another size, large ones, and all kinds of pixels."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from densefeat.page import create_app
from densefeat.page.photographs import PhotographMissing, decoded
from tests.densefeat.page.stores import photograph, replace_columns
from tests.helpers.stores import ROWS, make_store

ADDRESS = "http://127.0.0.1:8000"
WIDTH, HEIGHT = 400, 480
SHAPE = (12, 10)  # of the features, which show x from 40 to 360 and y from 60 to 444
SHOWN = (WIDTH, HEIGHT, [1 / 32, 0, -40 / 32, 0, 1 / 32, -60 / 32])


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    red, green = (np.linspace(0, 255, size) for size in (width, height))
    pixels = [np.broadcast_to(red, (height, width)), np.broadcast_to(green[:, None], (height, width))]
    return Image.fromarray(np.stack([*pixels, np.full((height, width), 128)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data: bytes, size: int = 240) -> np.ndarray:
    """As the page shows it, with the recorded size and map of ``SHOWN``."""
    width, height, affine = SHOWN
    row = {"width": width, "height": height, "affine": affine}
    return np.asarray(decoded(data, row, SHAPE, size).convert("RGB")).astype(int)


def error_to_the_original(data: bytes) -> int:
    return int(np.abs(shown(data) - shown(encoded(gradient(WIDTH, HEIGHT)))).max())


@pytest.mark.parametrize("size", [(400, 480), (200, 240), (133, 160), (134, 160), (401, 480), (800, 960), (997, 1196)])
def test_copies_of_another_size_lie_where_the_original_did(size: tuple[int, int]) -> None:
    assert error_to_the_original(encoded(gradient(*size))) <= 4


def test_a_thumbnail_made_by_pillow() -> None:
    thumbnail = gradient(WIDTH, HEIGHT)
    thumbnail.thumbnail((101, 101))
    assert error_to_the_original(encoded(thumbnail)) <= 5


@pytest.mark.parametrize("size", [(480, 400), (400, 478), (398, 480), (131, 160), (160, 160)])
def test_photographs_of_other_proportions_are_not_shown(size: tuple[int, int]) -> None:
    with pytest.raises(PhotographMissing, match=rf"has {size[0]}×{size[1]} pixels, and .* 400×480: it is not the same"):
        shown(encoded(gradient(*size)))


def test_a_copy_that_is_turned_by_exif() -> None:
    turned = gradient(2 * WIDTH, 2 * HEIGHT).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({"kind": "PNG"}, {"kind": "JPEG", "quality": 95, "subsampling": 0}):
        assert error_to_the_original(encoded(turned, exif=exif, **options)) <= 6  # type: ignore[arg-type]


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(7070, 8484), "JPEG", quality=90)  # 60 megapixels
    loaded: list[tuple[int, int]] = []
    convert = Image.Image.convert

    def watched(self: Image.Image, *args: Any, **options: Any) -> Image.Image:
        loaded.append(self.size)
        return convert(self, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", watched)
    assert error_to_the_original(data) <= 6
    assert max(loaded) == (884, 1061)


def test_pixels_of_all_kinds() -> None:
    grey = np.broadcast_to(np.linspace(0, 65535, WIDTH), (HEIGHT, WIDTH)).astype(np.uint16)
    deep = shown(encoded(Image.fromarray(grey)))
    assert np.abs(deep[..., 0] - shown(encoded(gradient(WIDTH, HEIGHT)))[..., 0]).max() <= 3
    clear = gradient(WIDTH, HEIGHT).convert("RGBA")
    clear.putalpha(0)
    assert shown(encoded(clear)).min() == 255
    for mode in ("L", "1", "P", "CMYK", "LA"):
        image = Image.new("L", (WIDTH, HEIGHT), 255).convert(mode)
        assert shown(encoded(image, "JPEG" if mode == "CMYK" else "PNG")).min() >= 250


def test_another_photograph_below_images_is_refused_and_a_copy_shown(tmp_path: Path) -> None:
    uri, images = str(tmp_path / "store"), tmp_path / "images" / "class"
    make_store(uri)
    replace_columns(uri, width=[400] * ROWS, height=[480] * ROWS, affine=[SHOWN[2]] * ROWS)
    images.mkdir(parents=True)
    (images / "000.jpg").write_bytes(encoded(gradient(200, 240), "JPEG", quality=95))
    (images / "001.jpg").write_bytes(photograph(1, size=(300, 300)))
    client = TestClient(create_app(uri, images=str(images.parent)), base_url=ADDRESS)
    found = np.asarray(Image.open(io.BytesIO(client.get("/api/photograph/0?size=240").content))).astype(int)
    assert np.abs(found - shown(encoded(gradient(WIDTH, HEIGHT)))).max() <= 8
    answer = client.get("/api/photograph/1")
    assert answer.status_code == 404
    assert "it is not the same" in answer.json()["error"]
