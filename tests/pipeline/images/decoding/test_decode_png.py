"""PNG: every depth, colour type and transparency to its definition; what is not pixels costs none."""

import itertools
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images.decoding.decode import Geometry, decode
from tests.helpers.image_writers import chunk, over_white, pixels_of, png, whole
from tests.helpers.photographs import encode, orientation_exif

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
DEPTHS = {GRAY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GRAY_ALPHA: (8, 16), RGBA: (8, 16)}
FLAVOURS = [(colour, bits) for colour, depths in DEPTHS.items() for bits in depths]
HEIGHT, WIDTH = 21, 19


def random_samples(colour: int, bits: int) -> NDArray[np.uint16]:
    rng = np.random.default_rng(10 * bits + colour)
    return rng.integers(0, 1 << bits, (HEIGHT, WIDTH, CHANNELS[colour])).astype(np.uint16)


def palette_of(bits: int) -> NDArray[np.uint8]:
    return np.random.default_rng(bits).integers(0, 256, (1 << bits, 3)).astype(np.uint8)


def tolerance_of(colour: int, bits: int) -> float:
    if bits == 16 and colour != GRAY:
        return 1.01 if colour == RGB else 2.01
    return 0.501 if colour in (GRAY, RGB) else 1.01  # Pillow's compositing rounds on its way


def shades(samples: NDArray[np.uint16], colour: int, bits: int) -> NDArray[np.float64]:
    """The definition without transparency: RGB in 0..1."""
    if colour == PALETTE:
        return palette_of(bits)[samples[..., 0]] / 255
    shares = samples[..., : 1 if colour in (GRAY, GRAY_ALPHA) else 3] / ((1 << bits) - 1)
    return np.broadcast_to(shares, (*samples.shape[:2], 3))


def check(data: bytes, expected: NDArray[np.float64], tolerance: float) -> None:
    assert np.abs(pixels_of(data, HEIGHT, WIDTH) - expected).max() <= tolerance


def status_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, Geometry((8, 8), "squash", (8, 8)))
    return caught.value.status


class TestTable:
    @pytest.mark.parametrize(("colour", "bits"), FLAVOURS)
    @pytest.mark.parametrize("interlace", [0, 1])
    def test_without_trns(self, colour: int, bits: int, interlace: int) -> None:
        samples = random_samples(colour, bits)
        plte = chunk(b"PLTE", palette_of(bits).tobytes()) if colour == PALETTE else b""
        expected = 255 * shades(samples, colour, bits)
        if colour in (GRAY_ALPHA, RGBA):
            expected = over_white(expected / 255, samples[..., -1] / ((1 << bits) - 1))
        check(png(samples, bits, colour, before=plte, interlace=interlace), expected, tolerance_of(colour, bits))

    @pytest.mark.parametrize(("colour", "bits"), [flavour for flavour in FLAVOURS if flavour[0] in (GRAY, RGB)])
    @pytest.mark.parametrize("interlace", [0, 1])
    def test_a_transparent_colour(self, colour: int, bits: int, interlace: int) -> None:
        """The one colour is white where it stands in all its bits, and colours beside it are not."""
        samples = random_samples(colour, bits)
        maximum = (1 << bits) - 1
        for key in (samples[3, 4], np.zeros(CHANNELS[colour]), np.full(CHANNELS[colour], maximum)):
            key = key.astype(np.uint16)
            samples[5, ::2] = key
            samples[6, ::2] = key
            samples[6, ::2, -1] ^= 1  # differs in the lowest bit
            body = struct.pack(f">{len(key)}H", *(int(value) | (0xFFFF & ~maximum) for value in key))
            for written in (struct.pack(f">{len(key)}H", *map(int, key)), body):  # bits above the depth do not count
                transparent = (samples == key).all(-1)
                expected = over_white(shades(samples, colour, bits), 1.0 - transparent)
                data = png(samples, bits, colour, before=chunk(b"tRNS", written), interlace=interlace)
                check(data, expected, tolerance_of(colour, bits))
                np.testing.assert_array_equal(pixels_of(data, HEIGHT, WIDTH)[transparent], 255)

    @pytest.mark.parametrize("bits", DEPTHS[PALETTE])
    @pytest.mark.parametrize("interlace", [0, 1])
    def test_palettes_with_alpha(self, bits: int, interlace: int) -> None:
        samples = random_samples(PALETTE, bits)
        colours = palette_of(bits)
        alphas = np.random.default_rng(0).integers(0, 256, len(colours)).astype(np.uint8)
        one = np.full(len(colours), 255, np.uint8)
        one[1] = 0
        for written, given in itertools.product((alphas, one), (len(colours), len(colours) // 2, len(colours) + 9)):
            alpha = np.full(len(colours), 255)
            alpha[:given] = written[:given]
            trns = chunk(b"tRNS", written.tobytes()[:given].ljust(given, b"\7"))
            data = png(samples, bits, PALETTE, before=chunk(b"PLTE", colours.tobytes()) + trns, interlace=interlace)
            check(data, over_white(colours[samples[..., 0]] / 255, alpha[samples[..., 0]] / 255), 1.01)

    def test_16_bit_gray_at_its_bounds(self) -> None:
        values = np.array([0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535], np.uint16)
        got = pixels_of(png(np.broadcast_to(values[None, :, None], (9, 9, 1)), 16, GRAY), 9, 9)
        np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 1, 127, 128, 254, 255, 255])

    def test_an_index_without_a_colour_is_black(self) -> None:
        samples = random_samples(PALETTE, 4)
        colours = palette_of(4)[:3]
        expected = np.where(samples < 3, colours[np.minimum(samples[..., 0], 2)], 0)
        check(png(samples, 4, PALETTE, before=chunk(b"PLTE", colours.tobytes())), expected, 0)


def zipped(length: int) -> bytes:
    return zlib.compress(bytes(length))


BAD_SUM = b"\0\0\0\5tEXta\0bcd\1\2\3\4"
# Chunks that do not decide pixels: huge once unpacked, too short, damaged, unknown.
ANCILLARY = {
    "profile": chunk(b"iCCP", b"name\0\0" + zipped(3 << 20)),
    "profile of no known packing": chunk(b"iCCP", b"name\0\7abc"),
    "profile without a name": chunk(b"iCCP", b""),
    "zTXt": chunk(b"zTXt", b"key\0\0" + zipped(3 << 20)),
    "zTXt of no known packing": chunk(b"zTXt", b"key\0\1abc"),
    "iTXt": chunk(b"iTXt", b"key\0\1\0\0\0" + zipped(3 << 20)),
    "iTXt cut short": chunk(b"iTXt", b"key\0"),
    "iTXt not UTF-8": chunk(b"iTXt", b"key\0\0\0\0\0\xff\xfe"),
    "tEXt": chunk(b"tEXt", b"key\0" + bytes(3 << 20)),
    "tEXt without a key": chunk(b"tEXt", b"\0\0"),
    "many texts": b"".join(chunk(b"zTXt", b"key%d\0\0" % number + zipped(900_000)) for number in range(80)),
    "bad sum": BAD_SUM,
    "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zipped(9 << 20)),
    "raw profile not hexadecimal": chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz"),
    "eXIf": chunk(b"eXIf", b"nonsense"),
    "eXIf, large": chunk(b"eXIf", bytes(3 << 20)),
    "unknown": chunk(b"abCd", b"1234") + chunk(b"abcD", b""),
    **{f"short {name.decode()}": chunk(name, b"\1") for name in (
        b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"bKGD", b"hIST", b"tIME", b"sBIT", b"sPLT", b"cICP", b"acTL", b"fcTL",
        b"fdAT",
    )},
    **{f"empty {name.decode()}": chunk(name) for name in (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"eXIf", b"tIME")},
    "animation out of order": chunk(b"acTL", struct.pack(">II", 3, 0))
    + chunk(b"fcTL", struct.pack(">IIIIIHHBB", 7, 900, 900, 0, 0, 1, 1, 0, 0)),
}  # fmt: skip


class TestAncillary:
    @pytest.mark.parametrize("name", ANCILLARY)
    @pytest.mark.parametrize(("colour", "bits"), [(RGB, 8), (PALETTE, 4), (GRAY, 16)])
    def test_chunks_that_are_not_pixels_cost_none(self, name: str, colour: int, bits: int) -> None:
        samples = random_samples(colour, bits)
        plte = chunk(b"PLTE", palette_of(bits).tobytes()) if colour == PALETTE else b""
        expected = 255 * shades(samples, colour, bits)
        odd = ANCILLARY[name]
        for before, after in ((odd + plte, b""), (plte + odd, b""), (plte, odd), (plte + odd, odd)):
            check(png(samples, bits, colour, before=before, after=after), expected, 0.501)

    def test_between_the_chunks_of_pixels(self) -> None:
        samples = random_samples(RGB, 8)
        data = png(samples, 8, RGB)
        second = data.index(b"IDAT", data.index(b"IDAT") + 4) - 4
        check(data[:second] + BAD_SUM + ANCILLARY["profile"] + data[second:], 255 * shades(samples, RGB, 8), 0)

    def test_cut_off_behind_the_pixels(self) -> None:
        samples = random_samples(RGB, 8)
        text = chunk(b"tEXt", b"key\0" + bytes(100))
        data = png(samples, 8, RGB, after=text)
        pixels_end = data.index(b"tEXt") - 4
        for length in range(pixels_end, len(data)):
            check(data[:length], 255 * shades(samples, RGB, 8), 0)
        for noise in (b"noise", bytes(50), b"\xff" * 50, data):
            check(data + noise, 255 * shades(samples, RGB, 8), 0)
            check(data[:pixels_end] + noise, 255 * shades(samples, RGB, 8), 0)

    def test_memory_is_bounded(self) -> None:
        data = png(random_samples(RGB, 8), 8, RGB, before=ANCILLARY["many texts"] + ANCILLARY["profile"])
        tracemalloc.start()
        whole(data, HEIGHT, WIDTH)
        assert tracemalloc.get_traced_memory()[1] < len(data) + (1 << 20)
        tracemalloc.stop()

    def test_damaged_transparency_counts_as_none(self) -> None:
        samples = random_samples(RGB, 8)
        key = struct.pack(">3H", *map(int, samples[0, 0]))
        sound = chunk(b"tRNS", key)
        expected = 255 * shades(samples, RGB, 8)
        for trns in (sound[:-1] + b"\0", chunk(b"tRNS", key[:5]), chunk(b"tRNS", key + b"\0"), chunk(b"tRNS")):
            check(png(samples, 8, RGB, before=trns), expected, 0)
        check(png(samples, 8, RGB, after=sound), expected, 0)  # out of place
        for colour in (GRAY_ALPHA, RGBA):  # which have an alpha channel
            samples = random_samples(colour, 8)
            np.testing.assert_array_equal(
                pixels_of(png(samples, 8, colour, before=sound), HEIGHT, WIDTH),
                pixels_of(png(samples, 8, colour), HEIGHT, WIDTH),
            )

    def test_orientation_in_exif_and_in_text(self) -> None:
        exif = orientation_exif(6).tobytes()
        body = exif.removeprefix(b"Exif\0\0")
        text = b"\nexif\n%8d\n" % len(exif) + exif.hex().encode() + b"\n"
        samples = random_samples(RGB, 8)
        turned = np.rot90(samples, -1)
        for odd in (
            chunk(b"eXIf", body),
            chunk(b"eXIf", exif),
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
            chunk(b"tEXt", b"Raw profile type exif\0" + text),
        ):
            for before, after in ((odd, b""), (b"", odd), (BAD_SUM + odd, b"")):
                data = png(samples, 8, RGB, before=before, after=after)
                np.testing.assert_array_equal(pixels_of(data, WIDTH, HEIGHT), turned)
        damaged = chunk(b"eXIf", body)[:-1] + b"\0"
        check(png(samples, 8, RGB, before=damaged), samples, 0)

    def test_an_animation_shows_the_image_in_idat(self) -> None:
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
        for default in (False, True):
            data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=default)
            assert b"fdAT" in data
            np.testing.assert_array_equal(pixels_of(data, 40, 40)[0, 0], [255, 0, 0])


class TestCritical:
    def test_every_flipped_bit_of_pixels_is_corrupt(self) -> None:
        """Pillow does not check the sums of IDAT, and reads on where the damage happens to unpack."""
        data = png(random_samples(RGB, 8), 8, RGB)
        start, end = data.index(b"IHDR"), data.index(b"IEND") - 4
        for at in range(start, end, 7):
            damaged = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
            assert status_of(damaged) in ("corrupt", "unsupported")
            assert status_of(damaged) == "corrupt" or damaged[at : at + 1].isalpha()

    def test_cut_off_in_pixels(self) -> None:
        data = png(random_samples(RGB, 8), 8, RGB)
        for length in range(8, data.index(b"IEND") - 4, 17):
            assert status_of(data[:length]) == "corrupt"

    @pytest.mark.parametrize(
        "header",
        [(16, 16, 3, 0, 0, 0, 0), (16, 16, 8, 1, 0, 0, 0), (16, 16, 16, 3, 0, 0, 0), (16, 16, 4, 2, 0, 0, 0),
         (16, 16, 8, 2, 1, 0, 0), (16, 16, 8, 2, 0, 1, 0), (16, 16, 8, 2, 0, 0, 2)],
    )  # fmt: skip
    def test_headers_against_the_specification(self, header: tuple[int, ...]) -> None:
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header))
        assert status_of(data + chunk(b"IDAT", zipped(16 * 97)) + chunk(b"IEND")) == "corrupt"

    def test_chunks_missing_or_out_of_place(self) -> None:
        samples = random_samples(PALETTE, 8)
        plte = chunk(b"PLTE", palette_of(8).tobytes())
        sound = png(samples, 8, PALETTE, before=plte)
        header = sound[8:33]
        assert status_of(png(samples, 8, PALETTE)) == "corrupt"
        assert status_of(png(samples, 8, PALETTE, after=plte)) == "corrupt"
        assert status_of(png(samples, 8, PALETTE, before=plte + plte)) == "corrupt"
        assert status_of(sound[:8] + plte + sound[8:]) == "corrupt"
        assert status_of(sound[:33] + header + sound[33:]) == "corrupt"
        for length in (0, 4, 771):
            assert status_of(png(samples, 8, PALETTE, before=chunk(b"PLTE", bytes(length)))) == "corrupt"
        assert status_of(sound[:33] + chunk(b"IEND")) == "corrupt"

    def test_an_unknown_critical_chunk_is_unsupported(self) -> None:
        samples = random_samples(RGB, 8)
        assert status_of(png(samples, 8, RGB, before=chunk(b"CgBI", bytes(4)))) == "unsupported"
        assert status_of(png(samples, 8, RGB, before=chunk(b"CgBI", bytes(4))[:-1] + b"\0")) == "corrupt"


class TestNoDetour:
    def test_a_file_of_critical_chunks_is_not_copied(self, tmp_path: Path) -> None:
        from pipeline.images.decoding import png as decode_png

        plain = png(random_samples(RGB, 8), 8, RGB)
        assert decode_png._read_chunks(plain).data is plain
