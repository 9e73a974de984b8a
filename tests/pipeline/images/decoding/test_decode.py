"""Bytes -> pixels: every odd format, exact geometry, and the same from many threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decoding import decode as decode_module
from pipeline.images.decoding.decode import Decoded, Geometry, decode
from tests.helpers.image_writers import SQUASH, status_of
from tests.helpers.photographs import encode, gradient, orientation_exif, photo
from tests.helpers.stores import SHARED

PHOTOS = SHARED / "data" / "coco200" / "images"


def mean_colour(decoded: Decoded) -> list[float]:
    return [float(value) for value in decoded.pixels.mean((1, 2))]


class TestFormats:
    @pytest.mark.parametrize(
        ("fmt", "options"),
        [
            ("JPEG", {"quality": 95}),
            ("JPEG", {"quality": 95, "progressive": True}),
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("GIF", {}),
            ("BMP", {}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("PPM", {}),
            ("JPEG2000", {}),
            ("AVIF", {"quality": 95}),
        ],
    )
    def test_every_format_gives_the_same_picture(self, fmt: str, options: dict[str, object]) -> None:
        decoded = decode(photo(64, 64, fmt, **options), SQUASH)
        expected = np.asarray(Image.fromarray(gradient(64, 64)).resize((32, 32), Image.Resampling.BICUBIC))
        assert decoded.pixels.dtype == np.uint8
        assert decoded.pixels.shape == (3, 32, 32)
        assert decoded.pixels.flags.c_contiguous
        difference = np.abs(decoded.pixels.astype(int) - expected.transpose(2, 0, 1))
        assert difference.mean() < (9 if fmt == "GIF" else 4)  # GIF: 256 colours

    def test_cmyk_and_adobe_inverted_jpeg(self) -> None:
        red = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
        for data in (encode(red, "JPEG", quality=95), encode(red, "TIFF")):
            r, g, b = mean_colour(decode(data, SQUASH))
            assert r > 245
            assert g < 10
            assert b < 10

    def test_ycck_jpeg(self) -> None:
        """Adobe marker with transform 2: as Photoshop writes. Made from CMYK by flipping the marker's last byte."""
        data = encode(Image.new("CMYK", (40, 40), (0, 0, 0, 128)), "JPEG")
        at = data.index(b"Adobe\x00\x64") + 11
        decoded = decode(data[:at] + b"\x02" + data[at + 1 :], SQUASH)
        assert decoded.pixels.shape == (3, 32, 32)

    @pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
    def test_16_bit_gray_is_divided_by_257(self, fmt: str) -> None:
        for value, expected in ((65535, 255), (257 * 100, 100), (128, 0), (129, 1)):
            image = Image.fromarray(np.full((40, 40), value, np.uint16))
            assert image.mode == "I;16"
            assert mean_colour(decode(encode(image, fmt), SQUASH)) == [expected] * 3

    def test_16_bit_big_endian_tiff_and_pgm(self) -> None:
        image = Image.frombytes("I;16B", (40, 40), np.full((40, 40), 257 * 70, ">u2").tobytes())
        assert mean_colour(decode(encode(image, "TIFF"), SQUASH)) == [70] * 3
        pgm = b"P5 40 40 65535\n" + np.full((40, 40), 257 * 33, ">u2").tobytes()
        assert mean_colour(decode(pgm, SQUASH)) == [33] * 3

    def test_16_bit_gray_png_with_a_transparent_value(self) -> None:
        values = np.full((40, 40), 257 * 50, np.uint16)
        data = encode(Image.fromarray(values), "PNG", transparency=257 * 50)
        assert mean_colour(decode(data, SQUASH)) == [255] * 3

    @pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
    def test_pixels_without_a_range_are_unsupported(self, mode: str, dtype: type) -> None:
        image = Image.fromarray(np.ones((40, 40), dtype))
        assert image.mode == mode
        assert status_of(encode(image, "TIFF")) == "unsupported"

    def test_bilevel_and_gray(self) -> None:
        assert mean_colour(decode(encode(Image.new("1", (40, 40), 1), "PNG"), SQUASH)) == [255] * 3
        assert mean_colour(decode(encode(Image.new("L", (40, 40), 77), "PNG"), SQUASH)) == [77] * 3
        assert mean_colour(decode(encode(Image.new("L", (40, 40), 77), "JPEG"), SQUASH)) == [77] * 3

    def test_transparency_is_composited_over_white(self) -> None:
        rgba = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
        half = Image.new("LA", (40, 40), (0, 128))
        palette = Image.new("P", (40, 40), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        for data in (
            encode(rgba, "PNG"),
            encode(rgba, "WEBP", lossless=True, exact=True),
            encode(palette, "PNG", transparency=1),
            encode(palette, "PNG", transparency=b"\xff\x00"),
            encode(palette, "GIF", transparency=1),
            encode(Image.new("RGB", (40, 40), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        ):
            assert mean_colour(decode(data, SQUASH)) == [255] * 3
        assert mean_colour(decode(encode(half, "PNG"), SQUASH)) == [127] * 3

    @pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "MPO"])
    def test_first_frame(self, fmt: str) -> None:
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
        r, g, b = mean_colour(decode(encode(frames[0], fmt, save_all=True, append_images=frames[1:]), SQUASH))
        assert r > 240
        assert max(g, b) < 15


class TestGeometry:
    @staticmethod
    def original(height: int, width: int, y: int, x: int) -> Image.Image:
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[y : y + 8, x : x + 8] = 255  # its centre is (x + 4, y + 4)
        return Image.fromarray(pixels)

    @pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
    @pytest.mark.parametrize("shape", [(203, 301), (301, 203)])
    def test_a_dot_is_where_affine_says(self, fit: str, orientation: int, fmt: str, shape: tuple[int, int]) -> None:
        height, width = shape
        y, x = height // 2 - 30, width // 2 + 21
        stored = self.original(height, width, y, x)
        if orientation > 1:  # what a camera would have stored to show this
            inverse = {6: 8, 8: 6}.get(orientation, orientation)
            stored = stored.transpose(decode_module._TURNS[inverse])
        options = {"exif": orientation_exif(orientation)} if fmt != "TIFF" else {"tiffinfo": {274: orientation}}
        # Features finer than pixels by another factor on each axis, so that swapped axes show.
        decoded = decode(encode(stored, fmt, **options), Geometry((96, 80), fit, (192, 240)))
        assert (decoded.height, decoded.width) == (height, width)
        a, b, c, d, e, f = decoded.affine
        assert b == d == 0
        weights = np.where(decoded.pixels.min(0) > 130, decoded.pixels[0], 0).astype(float)
        rows, columns = np.mgrid[:96, :80] + 0.5
        found = ((weights * columns).sum() / weights.sum() * 3, (weights * rows).sum() / weights.sum() * 2)
        expected = (a * (x + 4) + c, e * (y + 4) + f)
        # Half a pixel of the network's: the threshold moves the centre of mass a little.
        assert found == pytest.approx(expected, abs=1.5)

    def test_crop_equals_cropping_the_resized_whole(self) -> None:
        image = Image.fromarray(gradient(100, 150))
        decoded = decode(encode(image, "PNG"), Geometry((50, 50), "crop", (25, 25)))
        expected = np.asarray(image.resize((75, 50), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        # The crop begins at 12.5 of those 75 pixels: halfway between two of them.
        between = (expected[:, :, 12:62].astype(float) + expected[:, :, 13:63]) / 2
        assert np.abs(decoded.pixels - between).max() <= 1.5
        assert decoded.affine == pytest.approx((0.25, 0, -6.25, 0, 0.25, 0))
        assert decoded.valid_box == (0, 0, 25, 25)

    def test_pad_is_at_the_top_left_and_the_rest_is_the_mean_colour(self) -> None:
        decoded = decode(photo(100, 200, "PNG"), Geometry((64, 64), "pad", (16, 16)))
        assert decoded.valid_box == (0, 0, 8, 16)
        np.testing.assert_array_equal(decoded.pixels[:, 32:], np.broadcast_to([[[124]], [[116]], [[104]]], (3, 32, 64)))
        assert decoded.affine == pytest.approx((16 / 200, 0, 0, 0, 8 / 100, 0))

    @pytest.mark.parametrize(("content", "expected"), [(23, 6), (22, 5), (21, 5), (24, 6), (2, None), (3, 1)])
    def test_valid_box_holds_the_centres_on_the_image(self, content: int, expected: int | None) -> None:
        """64 -> 16: feature pixel i has its centre at 4i + 2 pixels; one on the very edge is outside."""
        data = photo(content, 64, "PNG")
        geometry = Geometry((64, 64), "pad", (16, 16))
        if expected is None:
            assert status_of(data, geometry, min_side=1) == "too_small"
        else:
            assert decode(data, geometry, min_side=1).valid_box == (0, 0, expected, 16)

    def test_upscaling_and_absurd_aspect(self) -> None:
        for fit in ("crop", "squash"):
            decoded = decode(photo(1, 50000, "PNG"), Geometry((64, 64), fit, (64, 64)), min_side=1)
            assert decoded.pixels.shape == (3, 64, 64)
            assert (decoded.height, decoded.width) == (1, 50000)

    @pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_draft_changes_speed_and_not_the_picture(self, monkeypatch, fit: str, orientation: int) -> None:
        data = photo(1203, 1601, quality=92, exif=orientation_exif(orientation))
        geometry = Geometry((96, 64), fit, (96, 64))
        stored = decode_module.open_stored(data)
        assert decode_module._draft(stored, geometry) in (4, 8)
        assert stored.jpeg is not None
        assert min(stored.jpeg.size) >= 2 * 64
        fast = decode(data, geometry)
        monkeypatch.setattr(decode_module, "_draft", lambda stored, geometry: 1)
        slow = decode(data, geometry)
        assert np.abs(fast.pixels.astype(int) - slow.pixels).max() <= 3
        assert fast.affine == slow.affine

    @pytest.mark.parametrize(
        "arguments", [((0, 4), "crop", (4, 4)), ((4, 4), "crop", (4, -1)), ((4, 4), "stretch", (4, 4))]
    )
    def test_a_bad_geometry_is_refused(self, arguments) -> None:
        with pytest.raises(ValueError, match="Geometry: got"):
            Geometry(*arguments)


class TestPhotos:
    @pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the COCO photos are not at {PHOTOS}")
    def test_real_photos_in_threads_equal_one_thread(self) -> None:
        files = [path.read_bytes() for path in sorted(PHOTOS.rglob("*.jpg"))[:24]]
        geometry = Geometry((224, 224), "crop", (224, 224))
        alone = [decode(data, geometry).pixels for data in files]
        with ThreadPoolExecutor(8) as pool:
            for expected, got in zip(alone, pool.map(lambda data: decode(data, geometry).pixels, files), strict=True):
                np.testing.assert_array_equal(got, expected)
