"""Bytes that are no image, or a damaged one: nothing but ImageError, and nothing printed."""

import contextlib
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images.decoding import decode as decode_module
from pipeline.images.decoding.decode import decode
from tests.helpers.image_writers import SQUASH, chunk, png, status_of, tiff
from tests.helpers.photographs import encode, orientation_exif, photo, png_header


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
        root = Path(__file__).parents[4]
        done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
