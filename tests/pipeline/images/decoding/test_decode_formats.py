"""PNM, BMP, GIF, WebP, JPEG, JPEG 2000, AVIF: pixels to their definition, and metadata that costs none."""

import itertools
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images.decoding.decode import Geometry, decode
from tests.helpers.image_writers import over_white, pixels_of, rows_of, whole
from tests.helpers.photographs import encode, gradient, orientation_exif, photo

HEIGHT, WIDTH = 13, 19


def random_values(maximum: int, channels: int) -> NDArray[np.uint16]:
    values = np.random.default_rng(maximum).integers(0, maximum + 1, (HEIGHT, WIDTH, channels)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, maximum
    return values


def status_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, Geometry((8, 8), "squash", (8, 8)), min_side=1)
    assert "expected" in str(caught.value) or caught.value.status != "unsupported"
    return caught.value.status


def check(data: bytes, expected: NDArray[np.float64], tolerance: float) -> None:
    assert np.abs(pixels_of(data, HEIGHT, WIDTH) - expected).max() <= tolerance


class TestPnm:
    @pytest.mark.parametrize("maximum", [1, 2, 3, 15, 100, 254, 255, 256, 1023, 4095, 32768, 65534, 65535])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_maximum(self, maximum: int, channels: int) -> None:
        values = random_values(maximum, channels)
        header = f"P{5 if channels == 1 else 6}\n# a comment\n{WIDTH} {HEIGHT}\n{maximum}\n".encode()
        binary = header + values.astype(">u2" if maximum > 255 else "u1").tobytes()
        plain = header.replace(b"P5", b"P2").replace(b"P6", b"P3") + " ".join(map(str, values.ravel())).encode()
        expected = np.broadcast_to(values / maximum * 255, (HEIGHT, WIDTH, 3))
        check(binary, expected, 0.501)
        check(plain, expected, 0.501 if maximum < 256 or channels == 3 else 0.51)  # Pillow goes by way of 16 bits

    def test_bitmaps(self) -> None:
        bits = random_values(1, 1)
        expected = np.broadcast_to(255.0 * (1 - bits), (HEIGHT, WIDTH, 3))
        check(b"P4 %d %d\n" % (WIDTH, HEIGHT) + b"".join(rows_of(bits, 1)), expected, 0)
        check(b"P1 %d %d\n" % (WIDTH, HEIGHT) + "".join(map(str, bits.ravel())).encode(), expected, 0)

    @pytest.mark.parametrize("maximum", [100, 1000])
    def test_truncated_or_above_the_maximum_is_corrupt(self, maximum: int) -> None:
        values = random_values(maximum, 1).astype(">u2" if maximum > 255 else "u1")
        header = f"P5 {WIDTH} {HEIGHT} {maximum}\n".encode()
        assert status_of(header + values.tobytes()[:-1]) == "corrupt"
        values[3, 4] = maximum + 1
        assert status_of(header + values.tobytes()) == "corrupt"

    def test_floats_are_unsupported(self) -> None:
        assert status_of(b"Pf 8 8\n-1.0\n" + bytes(256)) == "unsupported"


def bmp(
    rows: list[bytes], bits: int, *, palette: bytes = b"", colours: int = 0, masks: bytes = b"", core: bool = False,
    top_down: bool = False, packed: int = 0,
) -> bytes:  # fmt: skip
    """A BMP of ``rows`` from the top; ``masks`` of the channels make it one of bit fields."""
    body = b"".join(row.ljust(-(-len(row) // 4) * 4, b"\0") for row in (rows if top_down else rows[::-1]))
    if core:
        header = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        size = 40 + (len(masks) if len(masks) == 16 else 0)
        header = struct.pack(
            "<IiiHHIIiiII", size if size == 40 else 56, WIDTH, -HEIGHT if top_down else HEIGHT, 1, bits,
            packed or (3 if masks else 0), len(body), 0, 0, colours, 0,
        )  # fmt: skip
    start = 14 + len(header) + len(masks) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + masks + palette + body


def bgr(colours: NDArray[np.uint8], *, core: bool) -> bytes:
    return b"".join(bytes([*colour[::-1], *([] if core else [0])]) for colour in colours.tolist())


class TestBmp:
    @pytest.mark.parametrize("bits", [1, 4, 8])
    @pytest.mark.parametrize("kind", ["any", "gray", "black and white", "white and black", "ramp", "short ramp"])
    @pytest.mark.parametrize("core", [False, True])
    def test_palettes(self, bits: int, kind: str, core: bool) -> None:
        """Of grays, too: Pillow takes 8-bit pixels for 1-bit ones if the palette is black and white."""
        count = 1 << bits
        if kind in ("black and white", "white and black") and not core:
            count = 2
        elif kind == "short ramp" and not core:
            count = max(2, count // 4)
        colours = {
            "any": np.random.default_rng(bits).integers(0, 256, (count, 3)),
            "gray": np.repeat(np.linspace(0, 255, count)[:, None], 3, 1),
            "black and white": np.repeat(np.arange(count)[:, None] % 2 * 255, 3, 1),
            "white and black": np.repeat(255 - np.arange(count)[:, None] % 2 * 255, 3, 1),
        }.get(kind, np.repeat(np.arange(count)[:, None], 3, 1)).astype(np.uint8)
        indices = np.random.default_rng(0).integers(0, count, (HEIGHT, WIDTH, 1)).astype(np.uint16)
        given = 0 if count == 1 << bits else count
        for top_down in (False, not core):
            data = bmp(
                rows_of(indices, bits), bits, palette=bgr(colours, core=core), colours=given, core=core,
                top_down=top_down,
            )  # fmt: skip
            check(data, colours[indices[..., 0]], 0)

    def test_an_index_without_a_colour_is_black(self) -> None:
        indices = np.random.default_rng(0).integers(0, 16, (HEIGHT, WIDTH, 1)).astype(np.uint16)
        for bits, colours in itertools.product(
            (4, 8), ([[0] * 3, [255] * 3], [[0] * 3, [1] * 3, [2] * 3], [[9, 8, 7]])
        ):
            table = np.zeros((16, 3), np.uint8)
            table[: len(colours)] = colours
            palette = bgr(np.array(colours, np.uint8), core=False)
            check(bmp(rows_of(indices, bits), bits, palette=palette, colours=len(colours)), table[indices[..., 0]], 0)

    @pytest.mark.parametrize("core", [False, True])
    def test_24_bits(self, core: bool) -> None:
        pixels = random_values(255, 3)
        check(bmp(rows_of(pixels[..., ::-1], 8), 24, core=core), pixels, 0)

    def test_16_bits(self) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH))
        rows = [row.astype("<u2").tobytes() for row in values]
        for masks in ((), (0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)):
            shares = [
                (values & mask) / mask for mask in masks or (0x7C00, 0x3E0, 0x1F)
            ]  # a channel from its bits, full scale where all are set
            check(bmp(rows, 16, masks=struct.pack(f"<{len(masks)}I", *masks)), 255 * np.stack(shares, -1), 1)
        assert status_of(bmp(rows, 16, masks=struct.pack("<3I", 0xF00, 0xF0, 0xF))) in ("unsupported", "corrupt")

    def test_32_bits(self) -> None:
        pixels = random_values(255, 4)
        bgra = rows_of(pixels[..., [2, 1, 0, 3]], 8)
        check(bmp(bgra, 32), pixels[..., :3], 0)  # without bit fields the fourth byte has no meaning
        check(bmp(bgra, 32, masks=struct.pack("<3I", 0xFF0000, 0xFF00, 0xFF)), pixels[..., :3], 0)
        with_alpha = over_white(pixels[..., :3] / 255, pixels[..., 3] / 255)
        check(bmp(bgra, 32, masks=struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)), with_alpha, 1.01)

    def test_run_lengths(self) -> None:
        """RLE8: pairs of a number and an index; "0 0" ends a row, "0 1" the image."""
        indices = np.repeat(np.random.default_rng(0).integers(0, 2, (HEIGHT, 1)), WIDTH, 1)
        rows = [bytes([WIDTH, index, 0, 0]) for index in indices[:, 0]]
        for colours in ([[10, 20, 30], [40, 50, 60]], [[0] * 3, [1] * 3, [2] * 3]):
            palette = bgr(np.array(colours, np.uint8), core=False)
            data = bmp(rows, 8, palette=palette, colours=len(colours), packed=1)
            check(data + b"\0\1", np.array(colours)[indices], 0)
        palette = bgr(np.array([[0] * 3, [255] * 3], np.uint8), core=False)
        assert status_of(bmp(rows, 8, palette=palette, colours=2, packed=1)) == "unsupported"


class TestGif:
    @pytest.mark.parametrize("interlace", [0, 1])
    @pytest.mark.parametrize("transparency", [None, 0, 3])
    def test_palette_and_transparency(self, interlace: int, transparency: int | None) -> None:
        indices = np.random.default_rng(0).integers(0, 8, (HEIGHT, WIDTH)).astype(np.uint8)
        for colours in (np.random.default_rng(1).integers(0, 256, (256, 3)), np.repeat(np.arange(256)[:, None], 3, 1)):
            image = Image.fromarray(indices, "P")
            image.putpalette(colours.astype(np.uint8).tobytes())
            options = {} if transparency is None else {"transparency": transparency}
            data = encode(image, "GIF", interlace=interlace, optimize=False, **options)
            alpha = np.ones(256) if transparency is None else 1.0 * (np.arange(256) != transparency)
            check(data, over_white(colours / 255, alpha)[indices], 0.001)

    @pytest.mark.parametrize("transparency", [None, 0, 3])
    def test_a_first_frame_smaller_than_the_image(self, transparency: int | None) -> None:
        """White around it, whatever colour has the index 0."""
        image = Image.fromarray(np.full((HEIGHT, WIDTH), 2, np.uint8), "P")
        image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 9, 9, 9])
        data = encode(image, "GIF", optimize=False, **({} if transparency is None else {"transparency": transparency}))
        screen = struct.pack("<HH", WIDTH, HEIGHT)
        frame = data.index(b"," + bytes(4) + screen)
        larger = struct.pack("<HH", WIDTH + 5, HEIGHT + 4)
        moved = data[:6] + larger + data[10:frame] + b"," + struct.pack("<HH", 3, 2) + data[frame + 5 :]
        expected = np.full((HEIGHT + 4, WIDTH + 5, 3), 255)
        expected[2 : 2 + HEIGHT, 3 : 3 + WIDTH] = 10, 10, 200
        np.testing.assert_array_equal(pixels_of(moved, HEIGHT + 4, WIDTH + 5), expected)


class TestWebpAndAvif:
    def test_alpha(self) -> None:
        pixels = random_values(255, 4).astype(np.uint8)
        expected = over_white(pixels[..., :3] / 255, pixels[..., 3] / 255)
        check(encode(Image.fromarray(pixels), "WEBP", lossless=True, exact=True), expected, 1.01)
        flat = np.full((HEIGHT, WIDTH, 4), (200, 100, 50, 128), np.uint8)
        expected = over_white(flat[..., :3] / 255, flat[..., 3] / 255)
        check(encode(Image.fromarray(flat), "AVIF", quality=100), expected, 4)

    @pytest.mark.parametrize("fmt", ["WEBP", "AVIF"])
    @pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"\xff" * 3, b"II*\0\xff\xff\xff\xff" * 9])
    def test_broken_metadata(self, fmt: str, exif: bytes) -> None:
        metadata = Image.Exif()
        metadata[305] = "the software"
        data = photo(48, 64, fmt, exif=metadata, xmp=b"<" * 5000, icc_profile=b"no profile" * 900)
        good = metadata.tobytes().removeprefix(b"Exif\0\0")
        assert good in data
        broken = data.replace(good, exif.ljust(len(good), b"\xff")[: len(good)])
        assert broken != data
        assert np.abs(pixels_of(broken, 48, 64) - gradient(48, 64).astype(int)).mean() < 8


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(body) + 2) + body


def exif_body(orientation: int) -> bytes:
    return b"Exif\0\0" + orientation_exif(orientation).tobytes().removeprefix(b"Exif\0\0")


# Segments that do not decide pixels: some make Pillow give the file up, some are only large.
SEGMENTS = {
    "profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "profile in part": segment(0xE2, b"ICC_PROFILE\0\1\2abc"),
    "large profile": b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 40]) + bytes(65000)) for n in range(1, 41)),
    "short JFIF": segment(0xE0, b"JFIF"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "short MPF": segment(0xE2, b"MPF\0"),
    "MPF of nonsense": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "MPF of two images": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0\0\0\0\0"),
    "Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1a"),
    "Photoshop cut short": segment(0xED, b"Photoshop 3.0\x008BIM\0\1"),
    "empty Exif": segment(0xE1, b"Exif\0\0"),
    "Exif of nonsense": segment(0xE1, b"Exif\0\0" + b"\xff" * 500),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 60000),
    "XMP of nothing": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
    "FlashPix": segment(0xE2, b"FPXR\0"),
    "comment": segment(0xFE, b"x" * 65000) * 30,
    "empty comment": segment(0xFE, b""),
    "unknown": segment(0xE9, b"\0\1") + segment(0xEB, b"JP"),
    "fill bytes": b"\xff" * 9 + segment(0xFE, b"a"),
}  # fmt: skip


class TestJpeg:
    @pytest.mark.parametrize("name", SEGMENTS)
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_segments_that_are_not_pixels_cost_none(self, name: str, mode: str) -> None:
        image = Image.fromarray(gradient(48, 64)).convert(mode)
        data = encode(image, "JPEG", quality=95, subsampling=0)
        expected = pixels_of(data, 48, 64)
        for odd in (SEGMENTS[name], SEGMENTS["profile without a number"] + SEGMENTS[name]):
            np.testing.assert_array_equal(pixels_of(data[:2] + odd + data[2:], 48, 64), expected)

    @pytest.mark.parametrize("order", ["before", "behind"])
    def test_orientation_beside_broken_segments(self, order: str) -> None:
        data = encode(Image.fromarray(gradient(48, 64)), "JPEG")
        for name in ("profile without a number", "short JFIF", "comment", "unknown"):
            parts = [segment(0xE1, exif_body(6)), SEGMENTS[name]]
            odd = b"".join(parts if order == "before" else parts[::-1])
            assert (whole(data[:2] + odd + data[2:], 64, 48).height) == 64

    def test_colour_spaces_that_segments_tell(self) -> None:
        """RGB stored as such (Adobe, transform 0), and YCCK, keep their meaning beside broken segments."""
        red = np.full((16, 16, 3), (250, 10, 10), np.uint8)
        plain = encode(Image.fromarray(red), "JPEG", quality=100, subsampling=0, keep_rgb=True)
        ycck = encode(Image.fromarray(red).convert("CMYK"), "JPEG", quality=100)
        at = ycck.index(b"Adobe\x00\x64") + 11
        ycck = ycck[:at] + b"\2" + ycck[at + 1 :]
        for data in (plain, ycck):
            broken = data[:2] + SEGMENTS["profile without a number"] + data[2:]
            np.testing.assert_array_equal(pixels_of(broken, 16, 16), pixels_of(data, 16, 16))
        assert np.abs(pixels_of(plain, 16, 16) - red.astype(int)).max() <= 3

    def test_cmyk_to_its_definition(self) -> None:
        """Adobe stores ink inverted: 255 is none."""
        for ink in ((0, 255, 255, 0), (30, 60, 90, 120), (255, 0, 0, 0), (0, 0, 0, 200)):
            share = np.array(ink) / 255
            data = encode(Image.new("CMYK", (WIDTH, HEIGHT), ink), "JPEG", quality=100)
            assert b"Adobe" in data
            expected = np.broadcast_to(255 * (1 - share[:3]) * (1 - share[3]), (HEIGHT, WIDTH, 3))
            check(data, expected, 3)

    def test_other_depths_and_channels_are_unsupported(self) -> None:
        data = photo(48, 64)
        frame = data.index(b"\xff\xc0")
        for bits, channels in ((12, 3), (16, 1), (8, 2), (8, 5)):
            header = struct.pack(">BHHB", bits, 48, 64, channels) + b"\1\x11\0" * channels
            end = frame + 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
            assert status_of(data[:frame] + segment(0xC1, header) + data[end:]) == "unsupported"

    def test_the_first_image_of_an_mpo(self) -> None:
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime")]
        data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
        assert np.abs(pixels_of(data, 40, 40)[0, 0] - np.array([255, 0, 0])).max() <= 3
        (second,) = (at for at in range(2, len(data)) if data.startswith(b"\xff\xd8\xff", at))
        assert np.abs(pixels_of(data[:second], 40, 40)[0, 0] - np.array([255, 0, 0])).max() <= 3


class TestJpeg2000:
    @pytest.mark.parametrize("no_jp2", [False, True])
    def test_8_and_16_bits(self, no_jp2: bool) -> None:
        for channels in (1, 2, 3, 4):
            pixels = random_values(255, channels).astype(np.uint8)
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            colour = np.broadcast_to(pixels[..., : 1 if channels < 3 else 3] / 255, (HEIGHT, WIDTH, 3))
            alpha = pixels[..., -1] / 255 if channels in (2, 4) else np.ones((HEIGHT, WIDTH))
            data = encode(image, "JPEG2000", irreversible=False, no_jp2=no_jp2)
            check(data, over_white(colour, alpha), 1.01)
        values = random_values(65535, 1)
        data = encode(Image.fromarray(values[..., 0]), "JPEG2000", irreversible=False, no_jp2=no_jp2)
        check(data, np.broadcast_to(values / 257, (HEIGHT, WIDTH, 3)), 0.501)

    @pytest.mark.parametrize("depth", [1, 4, 7, 17, 32])
    @pytest.mark.parametrize("signed", [False, True])
    def test_other_depths_are_unsupported(self, depth: int, signed: bool) -> None:
        """Pillow shifts 4 bits up by 4: white would be 240."""
        data = bytearray(photo(HEIGHT, WIDTH, "JPEG2000", no_jp2=True))
        for component in range(3):
            data[42 + 3 * component] = depth - 1 + 128 * signed
        assert status_of(bytes(data)) == "unsupported"
        data[42:51] = photo(HEIGHT, WIDTH, "JPEG2000", no_jp2=True)[42:51]
        decode(bytes(data), Geometry((8, 8), "squash", (8, 8)))
        data[42] = 7 + 128
        assert status_of(bytes(data)) == "unsupported"
