"""TIFF: every combination of tags is decoded to its definition, or refused."""

import io
import itertools
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images.decoding.decode import Geometry, decode
from tests.helpers.image_writers import directory, over_white, pixels_of, tiff
from tests.helpers.photographs import encode, gradient

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
BITS = (1, 2, 4, 8, 12, 16)
EXTRAS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (2, 0), (0, 0))
LAYOUTS = ({}, {"rows": 5}, {"tile": (16, 16)})
COMPRESSIONS = (1, 5, 8, 32773, 32946, 34925, 50000)
HEIGHT, WIDTH = 21, 19


def random_samples(bits: int, photometric: int, extra: tuple[int, ...]) -> NDArray[np.uint16]:
    rng = np.random.default_rng(bits * 100 + photometric * 10 + len(extra))
    channels = COLOURS[photometric] + len(extra)
    samples = rng.integers(0, 1 << bits, (HEIGHT, WIDTH, channels)).astype(np.uint16)
    if extra[:1] == (1,):  # multiplied by alpha: never above it
        colours = COLOURS[photometric]
        samples[..., :colours] = np.minimum(samples[..., :colours], samples[..., colours : colours + 1])
    return samples


def colour_map(bits: int) -> NDArray[np.uint16]:
    """uint8 colours [2^bits, 3]."""
    return np.random.default_rng(bits).integers(0, 256, (1 << bits, 3)).astype(np.uint16)


def tags_of(photometric: int, bits: int, extra: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    tags: dict[int, tuple[int, ...]] = {262: (photometric,)}
    if extra:
        tags[338] = extra
    if photometric == PALETTE:
        tags[320] = tuple((colour_map(bits) * 257).T.reshape(-1).tolist())
    if photometric == YCBCR:
        tags[530] = (1, 1)
    return tags


def defined(samples: NDArray[np.uint16], photometric: int, bits: int, extra: tuple[int, ...]) -> NDArray[np.float64]:
    """The definition: what stands in the file -> RGB over white, [height, width, 3] in 0..255."""
    shares = samples / ((1 << bits) - 1)
    colour = shares[..., : COLOURS[photometric]]
    if photometric == WHITE_IS_ZERO:
        colour = 1 - colour
    elif photometric == PALETTE:
        colour = colour_map(bits)[samples[..., 0]] / 255
    elif photometric == CMYK:
        colour = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    elif photometric == YCBCR:
        y, cb, cr = np.moveaxis(samples[..., :3].astype(float), -1, 0)
        rgb = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
        colour = np.clip(np.stack(rgb, -1), 0, 255) / 255
    colour = np.broadcast_to(colour, (*colour.shape[:2], 3))
    alpha = shares[..., COLOURS[photometric]] if extra and extra[0] else np.ones(samples.shape[:2])
    if extra[:1] == (1,):
        return 255 * (colour + 1 - alpha[..., None])
    return over_white(colour, alpha)


def is_defined(photometric: int, bits: int, extra: tuple[int, ...]) -> bool:
    if extra[:1] == (1,) and photometric not in (BLACK_IS_ZERO, RGB):
        return False
    return photometric != YCBCR or bits == 8


def check(data: bytes, expected: NDArray[np.float64], tolerance: float) -> None:
    got = pixels_of(data, *expected.shape[:2])
    # To the nearest whole number, or its neighbour where Pillow's own conversion comes in.
    assert np.abs(got - expected).max() <= tolerance


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, Geometry((8, 8), "squash", (8, 8)))
    assert caught.value.status == "unsupported", str(caught.value)
    return str(caught.value)


class TestTable:
    @pytest.mark.parametrize("photometric", COLOURS)
    @pytest.mark.parametrize("bits", BITS)
    def test_every_combination_is_decoded_or_refused(self, photometric: int, bits: int) -> None:
        compressions, layouts = itertools.cycle(COMPRESSIONS), itertools.cycle(LAYOUTS)
        for extra in EXTRAS:
            samples = random_samples(bits, photometric, extra)
            expected = defined(samples, photometric, bits, extra) if is_defined(photometric, bits, extra) else None
            for order, planar in itertools.product("<>", (False, True)):
                data = tiff(
                    samples, bits, tags_of(photometric, bits, extra), order=order, planar=planar,
                    compression=next(compressions), **next(layouts),
                )  # fmt: skip
                if expected is None:
                    assert "expected" in refusal(data)
                else:
                    check(data, expected, 1.5 if photometric == YCBCR else 0.501)

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    @pytest.mark.parametrize("bits", BITS)
    def test_every_way_of_packing(self, compression: int, bits: int) -> None:
        others = itertools.cycle(((False, False), (False, True), (True, False), (True, True), (False, False)))
        for photometric, extra in ((WHITE_IS_ZERO, ()), (RGB, (2,))):
            samples = random_samples(bits, photometric, extra)
            expected = defined(samples, photometric, bits, extra)
            tags = tags_of(photometric, bits, extra)
            for order, layout, fill_order in itertools.product("<>", LAYOUTS, (1, 2)):
                planar, big = next(others)
                data = tiff(
                    samples, bits, tags, order=order, planar=planar, compression=compression, fill_order=fill_order,
                    big=big, **layout,
                )  # fmt: skip
                check(data, expected, 0.501)

    @pytest.mark.parametrize("compression", [5, 8, 32946, 34925, 50000])
    def test_predictor(self, compression: int) -> None:
        for bits, order, planar, layout in itertools.product(BITS, "<>", (False, True), LAYOUTS):
            samples = random_samples(bits, RGB, ())
            data = tiff(
                samples, bits, tags_of(RGB, bits, ()), order=order, planar=planar, compression=compression,
                predictor=2, **layout,
            )  # fmt: skip
            if bits in (8, 16):
                check(data, defined(samples, RGB, bits, ()), 0.501)
            else:
                assert "predictor 2" in refusal(data)

    def test_our_writer_writes_tiff(self) -> None:
        """What Pillow can read of it, it reads as we do."""
        for photometric, bits, order in ((BLACK_IS_ZERO, 4, "<"), (RGB, 8, ">"), (RGB, 16, "<"), (PALETTE, 8, "<")):
            samples = random_samples(bits, photometric, ())
            for layout, planar in ((LAYOUTS[0], False), (LAYOUTS[1], False), (LAYOUTS[2], False), (LAYOUTS[1], True)):
                if planar and bits != 8:
                    continue
                data = tiff(
                    samples, bits, tags_of(photometric, bits, ()), order=order, compression=1, planar=planar, **layout
                )
                with Image.open(io.BytesIO(data)) as image:
                    pillow = np.asarray(image.convert("RGB"))
                assert np.abs(pixels_of(data, HEIGHT, WIDTH) - pillow.astype(int)).max() <= (bits == 16)


class TestOddities:
    def test_16_bit_values_at_their_bounds(self) -> None:
        values = np.array([0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535], np.uint16)
        samples = np.broadcast_to(values[None, :, None], (9, 9, 1))
        for order in "<>":
            got = pixels_of(tiff(samples, 16, {262: (1,)}, order=order), 9, 9)[0, :, 0]
            np.testing.assert_array_equal(got, [0, 0, 1, 1, 127, 128, 254, 255, 255])

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("scale", [1, 256, 257])
    def test_palettes_of_8_and_16_bit_entries(self, bits: int, scale: int) -> None:
        samples = random_samples(bits, PALETTE, ())
        tags = {262: (PALETTE,), 320: tuple((colour_map(bits) * scale).T.reshape(-1).tolist())}
        np.testing.assert_array_equal(
            pixels_of(tiff(samples, bits, tags), HEIGHT, WIDTH), colour_map(bits)[samples[..., 0]]
        )

    def test_rgba_without_extra_samples(self) -> None:
        samples = random_samples(8, RGB, (2,))
        check(tiff(samples, 8, {262: (RGB,)}), defined(samples, RGB, 8, (2,)), 0.501)

    def test_one_value_of_bits_for_all_channels(self) -> None:
        samples = random_samples(8, RGB, ())
        check(tiff(samples, 8, {262: (RGB,), 258: (8,)}), defined(samples, RGB, 8, ()), 0.501)

    def test_strips_without_byte_counts(self) -> None:
        samples = random_samples(8, RGB, ())
        for compression in COMPRESSIONS:
            data = tiff(samples, 8, {262: (RGB,), 279: (0,)}, rows=5, compression=compression)
            check(data, defined(samples, RGB, 8, ()), 0.501)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, orientation: int) -> None:
        """As EXIF: the first row and column of the stored image are the displayed one's side that the tag names."""
        samples = random_samples(8, RGB, ())
        turned = {
            1: samples, 2: samples[:, ::-1], 3: samples[::-1, ::-1], 4: samples[::-1],
            5: samples.transpose(1, 0, 2), 6: np.rot90(samples, -1), 7: samples[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(samples),
        }[orientation]  # fmt: skip
        data = tiff(samples, 8, {262: (RGB,), 274: (orientation,)})
        np.testing.assert_array_equal(pixels_of(data, *turned.shape[:2]), turned)

    def test_a_strip_of_the_whole_image_is_read_in_portions(self) -> None:
        samples = np.random.default_rng(0).integers(0, 65536, (1500, 1100, 3)).astype(np.uint16)  # 10 MB
        for planar in (False, True):
            got = pixels_of(tiff(samples, 16, {262: (RGB,)}, planar=planar), 1500, 1100)
            np.testing.assert_array_equal(got, (samples.astype(int) + 128) // 257)


class TestRefused:
    @pytest.mark.parametrize("sample_format", [2, 3, 4, 5, 6, 99])
    @pytest.mark.parametrize("photometric", COLOURS)
    @pytest.mark.parametrize("bits", [8, 16, 32, 64])
    def test_samples_that_are_not_unsigned(self, sample_format: int, photometric: int, bits: int) -> None:
        channels = COLOURS[photometric]
        samples = np.zeros((16, 16, channels), np.uint16)
        tags = tags_of(photometric, 8, ()) | {339: (sample_format,) * channels, 258: (bits,) * channels}
        for order in "<>":
            assert f"{bits}-bit samples" in refusal(tiff(samples, 8, tags, order=order))
        if channels > 1:
            mixed = tags | {339: (1,) * (channels - 1) + (sample_format,)}
            assert "samples that are unsigned, " in refusal(tiff(samples, 8, mixed))

    @pytest.mark.parametrize("bits", [3, 5, 10, 14, 24, 32, 64])
    def test_depths(self, bits: int) -> None:
        samples = np.zeros((16, 16, 3), np.uint16)
        for photometric in (BLACK_IS_ZERO, RGB):
            part = samples[..., : COLOURS[photometric]]
            tags = {262: (photometric,), 258: (bits,) * part.shape[-1]}
            assert "bits per sample" in refusal(tiff(part, 8, tags))
        assert "bits per sample" in refusal(tiff(samples, 8, {262: (RGB,), 258: (5, 6, 5)}))

    @pytest.mark.parametrize("photometric", [4, 8, 9, 10, 32803, 32844, 32845, 34892, 51177])
    def test_meanings(self, photometric: int) -> None:
        data = tiff(np.zeros((16, 16, 3), np.uint16), 8, {262: (photometric,)})
        assert f"photometric interpretation {photometric} (" in refusal(data)

    @pytest.mark.parametrize(
        ("tags", "reason"),
        [
            ({}, "no PhotometricInterpretation"),
            ({262: (RGB,), 259: (34712,)}, "compression 34712"),
            ({262: (RGB,), 259: (50001,)}, "compression 50001"),
            ({262: (RGB,), 338: (0, 2)}, "extra samples"),
            ({262: (BLACK_IS_ZERO,), 338: (0, 2)}, "extra samples"),
            ({262: (BLACK_IS_ZERO,), 338: (2, 2)}, "extra samples"),
            ({262: (BLACK_IS_ZERO,), 338: (7, 0)}, "extra samples"),
            ({262: (BLACK_IS_ZERO,)}, "0 extra samples"),
            ({262: (YCBCR,)}, "subsampled (2, 2)"),
            ({262: (YCBCR,), 530: (1, 1), 532: (15, 235, 128, 240, 128, 240)}, "full range"),
            ({262: (RGB,), 284: (3,)}, "PlanarConfiguration"),
            ({262: (RGB,), 277: (100,), 258: (8,) * 100}, "100 samples per pixel"),
            ({262: (RGB,), 322: (1 << 20,), 323: (1 << 20,), 324: (8,), 325: (768,)}, "far larger"),
        ],
    )
    def test_other_tags(self, tags: dict[int, tuple[int, ...]], reason: str) -> None:
        assert reason in refusal(tiff(np.zeros((16, 16, 3), np.uint16), 8, tags))

    def test_other_inks_and_short_palettes(self) -> None:
        samples = np.zeros((16, 16, 4), np.uint16)
        assert "InkSet 2" in refusal(tiff(samples, 8, {262: (CMYK,), 332: (2,)}))
        for colours in ((), (0,) * 3 * 255, (0,) * 3 * 512):
            assert "palette" in refusal(
                tiff(samples[..., :1], 8, {262: (PALETTE,)} | ({320: colours} if colours else {}))
            )

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    def test_truncated_or_missing_pixels_are_corrupt(self, compression: int) -> None:
        samples = random_samples(8, RGB, ())
        for tags in ({278: (30,), 257: (30,)}, {278: (5,), 257: (30,)}, {273: (10**6,), 279: (9,)}, {257: (10**6,)}):
            data = tiff(samples, 8, {262: (RGB,)} | tags, compression=compression)
            with pytest.raises(ImageError) as caught:
                decode(data, Geometry((8, 8), "squash", (8, 8)))
            assert caught.value.status == "corrupt", str(caught.value)

    def test_flipped_bits_of_deflate_are_corrupt(self) -> None:
        samples = random_samples(8, RGB, ())
        data = tiff(samples, 8, {262: (RGB,)}, compression=8)
        for at in range(20, 1000, 50):
            damaged = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
            with pytest.raises(ImageError):
                decode(damaged, Geometry((8, 8), "squash", (8, 8)))


def with_broken_tags(data: bytes) -> bytes:
    """The same image in a directory with tags that hold nonsense, and do not decide pixels."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    records = [data[at + 2 + 12 * place :][:12] for place in range(count)]
    broken = {
        282: (2, 100, 10**9), 283: (2, 4, 0x41424344), 296: (3, 1, 2), 305: (2, 10**9, 8), 306: (77, 5, 5),
        320: (2, 7, 10**9), 332: (2, 9, 9), 529: (77, 1, 1), 532: (3, 99, 10**9),
        330: (4, 10**6, 8), 700: (5, 1, 9), 33723: (4, 1, 7), 34377: (7, 10**8, 8), 34665: (4, 1, 10**9),
        34675: (7, 10**9, 8), 34853: (4, 1, 3),
    }  # fmt: skip
    photometric = next(
        struct.unpack(order + "H", record[8:10])[0] for record in records if record[:2] == struct.pack(order + "H", 262)
    )
    for tag, only_with in ((320, PALETTE), (332, CMYK), (529, YCBCR), (532, YCBCR)):
        if photometric == only_with:
            del broken[tag]
    records = [record for record in records if struct.unpack_from(order + "H", record)[0] not in broken]
    records += [struct.pack(order + "HHII", tag, *rest) for tag, rest in broken.items()]
    return directory(data[8:], {}, order=order, raw=tuple(records))


class TestImageCodecs:
    @pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
    def test_fax(self, compression: str) -> None:
        bits = np.random.default_rng(0).integers(0, 2, (40, 50)).astype(bool)
        data = encode(Image.fromarray(bits), "TIFF", compression=compression)
        for black_is_zero in (True, False):
            # Pillow writes the one; the other is the same file with another value in the tag.
            found = (
                data
                if black_is_zero
                else data.replace(b"\x06\x01\x03\x00\x01\0\0\0\x01", b"\x06\x01\x03\x00\x01\0\0\0\0")
            )
            assert black_is_zero or found != data
            for file in (found, with_broken_tags(found)):
                expected = np.where(bits == black_is_zero, 255, 0)[..., None]
                np.testing.assert_array_equal(pixels_of(file, 40, 50), np.broadcast_to(expected, (40, 50, 3)))

    @pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK"])
    def test_jpeg(self, mode: str) -> None:
        image = Image.fromarray(gradient(48, 64)).convert(mode)
        data = encode(image, "TIFF", compression="jpeg", quality=95)
        for file in (data, with_broken_tags(data)):
            assert np.abs(pixels_of(file, 48, 64) - np.asarray(image.convert("RGB")).astype(int)).mean() < 3

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_old_jpeg(self, order: str) -> None:
        """A whole JPEG in the file, and tags that say where."""
        jpeg = encode(Image.fromarray(gradient(48, 64)), "JPEG", quality=95)
        tags = {
            256: (64,), 257: (48,), 258: (8,) * 3, 259: (6,), 262: (YCBCR,), 273: (8,), 277: (3,), 278: (48,),
            279: (len(jpeg),), 284: (1,), 512: (1,), 513: (8,), 514: (len(jpeg),),
        }  # fmt: skip
        for data in (directory(jpeg, tags, order=order), with_broken_tags(directory(jpeg, tags, order=order))):
            assert np.abs(pixels_of(data, 48, 64) - gradient(48, 64).astype(int)).mean() < 3

    def test_broken_tags_do_not_cost_other_images(self) -> None:
        samples = random_samples(16, RGB, (2,))
        for order, compression in itertools.product("<>", COMPRESSIONS):
            data = with_broken_tags(tiff(samples, 16, {262: (RGB,), 338: (2,)}, order=order, compression=compression))
            check(data, defined(samples, RGB, 16, (2,)), 0.501)

    def test_pixels_that_fax_and_jpeg_do_not_hold(self) -> None:
        for compression, channels, bits in ((4, 3, 8), (3, 1, 8), (7, 1, 16), (7, 4, 8), (6, 1, 8)):
            tags = {262: (RGB if channels > 1 else BLACK_IS_ZERO,), 259: (compression,)}
            assert "compression" in refusal(tiff(np.zeros((16, 16, channels), np.uint16), bits, tags))
