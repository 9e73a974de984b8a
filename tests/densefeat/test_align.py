"""Masks and images on the features' grid, by the recorded affine map, and back."""

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from densefeat import FeatureStore, MaskFolder, MissingFeatures
from densefeat.align import RowGeometry, align
from pipeline.images.decoding.decode import Geometry, decode
from tests.helpers.photographs import photo
from tests.helpers.stores import FAILED_ROWS, H, KnownStore, W, make_store


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / "store"))


def geometry(fit: str, image: tuple[int, int], features: tuple[int, int]) -> RowGeometry:
    """That of the pipeline's own decoder, for an image of this size."""
    decoded = decode(photo(*image, "PNG"), Geometry(features, fit, features), min_side=1)  # type: ignore[arg-type]
    record = {name: getattr(decoded, name) for name in ("height", "width", "affine", "valid_box")}
    return RowGeometry.from_record(record, features)


def fits(least: int, most: int) -> st.SearchStrategy[RowGeometry]:
    side = st.tuples(st.integers(least, most), st.integers(least, most))
    return st.builds(geometry, st.sampled_from(["crop", "pad", "squash"]), side, st.just((11, 14)))


def inside(array: np.ndarray, row: RowGeometry) -> np.ndarray:
    y0, x0, y1, x1 = row.valid_box
    return array[y0:y1, x0:x1]


@given(fits(15, 60), st.integers(0, 2**32 - 1))
def test_labels_come_back_unchanged_inside_the_valid_box(row: RowGeometry, seed: int) -> None:
    """Whenever the image is at least as large as its features."""
    labels = np.random.default_rng(seed).integers(0, 200, size=row.feature_size)
    back = align(align(labels, row, "image"), row, "features")
    assert np.array_equal(inside(back, row), inside(labels, row))
    outside = np.ones(row.feature_size, dtype=bool)
    inside(outside, row)[...] = False
    assert (back[outside] == -1).all()


@given(fits(4, 60), st.integers(0, 2**32 - 1))
def test_the_nearest_pixel_is_the_one_under_the_centre(row: RowGeometry, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 99, size=row.image_size)
    aligned = align(mask, row)
    y0, x0, y1, x1 = row.valid_box
    for y in (y0, (y0 + y1) // 2, y1 - 1):
        for x in (x0, (x0 + x1) // 2, x1 - 1):
            places = zip((y, x), row.shift, row.scale, row.image_size, strict=True)
            under = tuple(min(math.floor((p + 0.5 - shift) / scale), n - 1) for p, shift, scale, n in places)
            assert aligned[y, x] == mask[under]


@given(fits(4, 60), st.integers(1, 3))
def test_constants_stay_and_ramps_follow_the_affine_map(row: RowGeometry, channels: int) -> None:
    constant = np.full((*row.image_size, channels), 7, dtype=np.uint8)
    aligned = align(constant, row)
    assert aligned.shape == (*row.feature_size, channels)
    assert aligned.dtype == np.float32
    assert np.allclose(inside(aligned, row), 7)
    assert np.isnan(aligned).sum() == channels * (math.prod(row.feature_size) - inside(aligned, row)[..., 0].size)
    ramp = np.broadcast_to((np.arange(row.image_size[1]) + 0.5).astype(np.float32), row.image_size)
    x = (np.arange(row.feature_size[1]) + 0.5 - row.shift[1]) / row.scale[1]
    margin = math.ceil(max(row.scale[1], 1)) + 1  # pixels that are clipped at the border are averages of less
    y0, x0, y1, x1 = row.valid_box
    if x1 - x0 > 2 * margin:
        part = slice(x0 + margin, x1 - margin)
        # An average of whole pixels is off by at most an eighth of a pixel's area at each end.
        off = 0.25 * row.scale[1] if row.scale[1] < 1 else 0
        assert np.allclose(align(ramp, row)[y0:y1, part], x[part], atol=off + 1e-3)


def test_areas_are_averaged_with_exact_shares() -> None:
    row = RowGeometry((1, 5), (1, 2), (1.0, 0.4), (0.0, 0.0), (0, 0, 1, 2))
    image = np.array([[1.0, 2, 3, 4, 5]])
    assert np.allclose(align(image, row), [[(1 + 2 + 1.5) / 2.5, (1.5 + 4 + 5) / 2.5]])
    assert np.allclose(align(image > 3, row, interpolation="linear"), [[0, 0.8]])
    holes = align(np.array([[np.nan, 2, 3, 4, 5]]), row)
    assert np.isnan(holes[0, 0])
    assert holes[0, 1] == pytest.approx(4.2)  # a hole stays where it is


def test_growing_is_bilinear() -> None:
    row = RowGeometry((1, 2), (1, 4), (1.0, 2.0), (0.0, 0.0), (0, 0, 1, 4))
    assert np.allclose(align([[0.0, 1.0]], row), [[0, 0.25, 0.75, 1]])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.float64])
def test_kinds_and_fills(dtype: type) -> None:
    row = geometry("crop", (20, 30), (10, 10))
    back = align(np.ones(row.feature_size, dtype), row, "image", interpolation="nearest")
    kind = {np.bool_: np.bool_, np.float64: np.float32}.get(dtype, np.int64)
    assert back.dtype == kind
    assert back[:, 5:25].all()
    cropped = back[:, [0, 4, 25, 29]]
    assert np.isnan(cropped).all() if kind is np.float32 else (cropped == {np.bool_: 0}.get(kind, -1)).all()
    filled = align(np.ones(row.feature_size, dtype), row, "image", interpolation="nearest", fill=1)
    assert (filled == 1).all()


def test_channels_stay_where_they_are(known: KnownStore) -> None:
    store, image = FeatureStore(known.uri), np.random.default_rng(0).random((2 * H, 2 * W, 3))
    last, first = store.align(image, 5), store.align(image.transpose(2, 0, 1), 5)
    assert (last.shape, first.shape) == ((H, W, 3), (3, H, W))
    assert np.array_equal(last.transpose(2, 0, 1), first, equal_nan=True)
    row = RowGeometry((4, 4), (2, 2), (0.5, 0.5), (0.0, 0.0), (0, 0, 2, 2))
    cube = np.random.default_rng(0).random((4, 4, 4))
    with pytest.raises(ValueError, match="first or last"):
        align(cube, row)
    assert align(cube, row, channels="first").shape == (4, 2, 2)
    assert align(cube, row, channels="last").shape == (2, 2, 4)


def test_what_does_not_fit_is_refused(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    for shape in [(H, W), (2 * W, 2 * H), (2 * H,), (2 * H, 2 * W, 1, 1)]:
        with pytest.raises(ValueError, match=rf"{2 * H}×{2 * W} .*got an array of shape"):
            store.align(np.zeros(shape), 5)
    with pytest.raises(ValueError, match=rf"the features, {H}×{W}"):
        store.align(np.zeros((2 * H, 2 * W)), 5, to="image")
    with pytest.raises(ValueError, match="to must be"):
        store.align(np.zeros((H, W)), 5, to="grid")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="complex"):
        store.align(np.zeros((2 * H, 2 * W), complex), 5)
    with pytest.raises(MissingFeatures):
        store.align(np.zeros((2 * H, 2 * W)), FAILED_ROWS[0])


def test_masks_by_key(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    classes = np.array([[0, 1], [7, 255]], dtype=np.uint8)
    Image.fromarray(classes).save(tmp_path / "class" / "1.png")
    palette = Image.new("P", (2, 2))
    palette.putpalette(list(range(256)) * 3)
    palette.putdata(classes.reshape(-1).tolist())
    palette.save(tmp_path / "class" / "2.jpg.png")
    Image.fromarray(np.array([[300, 65535]], dtype=np.uint16)).save(tmp_path / "no_suffix.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "colours.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "colours.png").read_bytes()[:50])
    masks = MaskFolder(tmp_path)
    assert np.array_equal(masks("class/1.jpg"), classes)
    assert np.array_equal(masks("class/2.jpg"), classes)
    assert masks("no_suffix").tolist() == [[300, 65535]]
    assert masks.missing(["class/1.jpg", "class/3.jpg", "no_suffix"]) == ["class/3.jpg"]
    with pytest.raises(FileNotFoundError, match=r"class/3\.jpg\.png or class/3\.png"):
        masks("class/3.jpg")
    with pytest.raises(ValueError, match="got mode RGB"):
        masks("colours.jpg")
    with pytest.raises(ValueError, match="is not a mask"):
        masks("damaged.jpg")
    with pytest.raises(FileNotFoundError, match="has no files"):
        MaskFolder(tmp_path / "other").missing(["a"])


def png(samples: np.ndarray, bits: int) -> bytes:
    """A grey PNG file of 1, 2, 4, 8 or 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = []
    for row in samples.tolist():
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_masks_of_any_depth_hold_the_classes(tmp_path: Path, bits: int) -> None:
    samples = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    samples[0, :2] = 0, 2**bits - 1
    (tmp_path / "a.png").write_bytes(png(samples, bits))
    np.testing.assert_array_equal(MaskFolder(tmp_path)("a.jpg").astype(np.int64), samples)
