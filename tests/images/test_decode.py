"""Bytes -> pixels: every odd format, exact geometry, and nothing but ImageError for bad bytes."""

import contextlib
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images.decoding import decode as decode_module
from pipeline.images.decoding.decode import Decoded, Geometry, decode
from tests.helpers.image_writers import chunk, png, tiff
from tests.helpers.photographs import encode, gradient, orientation_exif, photo, png_header

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "coco200" / "images"
SQUASH = Geometry((32, 32), "squash", (32, 32))


def mean_colour(decoded: Decoded) -> list[float]:
    return [float(value) for value in decoded.pixels.mean((1, 2))]


def status_of(data: bytes, geometry: Geometry = SQUASH, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, geometry, **options)
    assert str(caught.value)
    return caught.value.status


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


class TestRefused:
    def test_empty_truncated_and_not_images(self) -> None:
        data = photo(200, 200)
        assert status_of(b"") == "corrupt"
        assert status_of(data[: len(data) // 2]) == "corrupt"
        assert status_of(photo(200, 200, "PNG")[:-200]) == "corrupt"
        assert status_of(data[:20]) == "corrupt"
        assert status_of(b"<!DOCTYPE html><html>404</html>") == "unsupported"
        assert status_of(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "unsupported"
        assert status_of(b"\x00") == "unsupported"

    def test_one_pixel_is_too_small(self) -> None:
        assert status_of(photo(1, 1, "PNG")) == "too_small"
        assert decode(photo(1, 1, "PNG"), SQUASH, min_side=1).pixels.shape == (3, 32, 32)

    def test_a_bomb_takes_no_memory(self) -> None:
        data = png_header(60000, 60000)
        tracemalloc.start()
        assert status_of(data) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()

    def test_no_memory_says_nothing_about_the_image(self, monkeypatch) -> None:
        def fail(data: bytes) -> None:
            raise MemoryError

        monkeypatch.setattr(decode_module, "open_stored", fail)
        with pytest.raises(MemoryError):
            decode(photo(40, 40), SQUASH)

    def test_max_pixels_is_the_callers(self) -> None:
        assert status_of(photo(100, 100), max_pixels=9_999) == "too_large"
        decode(photo(100, 100), SQUASH, max_pixels=10_000)
        # Between Pillow's warning and its error: ours to judge, so the missing pixels are what is wrong.
        assert status_of(png_header(10_000, 10_000)) == "corrupt"

    def test_a_webp_bomb(self) -> None:
        vp8x = b"RIFF\x16\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x10\x00\x00\x00\xff\xff\x00\xff\xff\x00"
        assert status_of(vp8x) in ("too_large", "corrupt")

    # As pipeline.images.decoding.decode does when it is imported; pytest's own filters come before that.
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
    def test_damaged_exif_counts_as_none(self) -> None:
        data = photo(40, 40, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
        assert decode(data, SQUASH).pixels.shape == (3, 32, 32)
        data = photo(40, 40, exif=orientation_exif(77))
        assert decode(data, SQUASH).height == 40


NOISE = np.random.default_rng(0).integers(0, 16, (24, 24, 4)).astype(np.uint16)
SEEDS = [
    photo(24, 32),
    photo(24, 32, exif=orientation_exif(6)),
    encode(Image.new("CMYK", (24, 24)), "JPEG"),
    photo(24, 32, "PNG"),
    photo(24, 32, "GIF"),
    photo(24, 32, "TIFF"),
    photo(24, 32, "TIFF", compression="tiff_deflate"),
    photo(24, 32, "WEBP"),
    photo(24, 32, "BMP"),
    photo(24, 32, "JPEG2000"),
    photo(24, 32, "PPM"),
    encode(Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24)), "PNG"),
    png(NOISE[..., :3], 16, 2, before=chunk(b"tRNS", bytes(6)), interlace=1),
    png(
        NOISE[..., :1], 4, 3, before=chunk(b"PLTE", bytes(48)) + chunk(b"tRNS", bytes(16)), after=chunk(b"eXIf", b"II*")
    ),
    tiff(NOISE, 16, {262: (2,), 338: (1,)}, order=">", planar=True, tile=(16, 16)),
    tiff(NOISE[..., :1], 12, {262: (0,)}, compression=5, rows=5, big=True),
    tiff(NOISE[..., :1], 4, {262: (3,), 320: (0,) * 48}, compression=8, rows=5),
    tiff(NOISE, 8, {262: (5,)}, compression=32773, fill_order=2),
    encode(Image.new("1", (24, 24)), "TIFF", compression="group4"),
    photo(24, 32, "TIFF", compression="jpeg"),
    b"P6 24 24 1000\n" + NOISE[..., :3].astype(">u2").tobytes(),
]


def with_good_sums(data: bytes) -> bytes:
    """A damaged PNG whose checksums say that it is not: so damage comes further than to them."""
    at, parts = 8, [data[:8]]
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        parts.append(chunk(data[at + 4 : at + 8], data[at + 8 : end - 4]))
        at = end
    return b"".join(parts)


class TestFuzz:
    @settings(max_examples=1200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1)
    )
    def test_damaged_bytes_decode_or_raise_image_error(self, seed: bytes, flips, keep: float) -> None:
        data = bytearray(seed)
        for place, value in flips:
            data[int(place * (len(data) - 1))] = value
        if keep < 0.5:  # else whole
            data = data[: int(2 * keep * len(data))]
        for damaged in (bytes(data), with_good_sums(bytes(data))) if seed.startswith(b"\x89PNG") else (bytes(data),):
            with contextlib.suppress(ImageError):
                assert decode(damaged, SQUASH, max_pixels=1_000_000).pixels.shape == (3, 32, 32)

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=200), st.sampled_from([b"", *(seed[:12] for seed in SEEDS)]))
    def test_noise_behind_any_magic(self, noise: bytes, magic: bytes) -> None:
        with pytest.raises(ImageError):
            decode(magic + noise, SQUASH, max_pixels=1_000_000, min_side=33)


class TestQuiet:
    def test_nothing_is_printed_about_odd_files(self, tmp_path: Path) -> None:
        files = [photo(40, 40, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"), png_header(10_000, 10_000)]
        for index, data in enumerate(files):
            (tmp_path / str(index)).write_bytes(data)
        program = (
            "import pathlib, sys\nfrom pipeline.images.decoding.decode import Geometry, decode\n"
            "from pipeline.errors import ImageError\n"
            "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
            "    try:\n        decode(path.read_bytes(), Geometry((32, 32), 'crop', (32, 32)))\n"
            "    except ImageError:\n        pass\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


class TestPhotos:
    @pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the COCO photos are not at {PHOTOS}")
    def test_real_photos_in_threads_equal_one_thread(self) -> None:
        files = [path.read_bytes() for path in sorted(PHOTOS.rglob("*.jpg"))[:24]]
        geometry = Geometry((224, 224), "crop", (224, 224))
        alone = [decode(data, geometry).pixels for data in files]
        with ThreadPoolExecutor(8) as pool:
            for expected, got in zip(alone, pool.map(lambda data: decode(data, geometry).pixels, files), strict=True):
                np.testing.assert_array_equal(got, expected)
