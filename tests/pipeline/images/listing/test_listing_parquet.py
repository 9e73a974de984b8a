"""Parquet: columns of one name, images and keys that are texts."""

import base64
from pathlib import Path
from urllib.parse import quote_from_bytes

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ImageError, JobError
from pipeline.images.listing.inline import inline_image, is_inline_image
from pipeline.images.listing.source import list_images
from tests.helpers.datasets import column, found, read
from tests.helpers.photographs import photo

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]


def encode(data: bytes, how: str) -> str:
    plain = base64.b64encode(data).decode()
    return {
        "plain": plain,
        "unpadded": plain.rstrip("="),
        "urlsafe": base64.urlsafe_b64encode(data).decode(),
        "lines": base64.encodebytes(data).decode(),
        "uri": f"data:image/png;base64,{plain}",
        "escaped uri": "DATA:;base64," + plain.replace("+", "%2B").replace("/", "%2F"),
        "percent": "data:," + quote_from_bytes(data),
    }[how]


@pytest.mark.parametrize("how", ["plain", "unpadded", "urlsafe", "lines", "uri", "escaped uri", "percent"])
@pytest.mark.parametrize("struct", [False, True])
def test_images_as_text(tmp_path: Path, how: str, struct: bool) -> None:
    images = [photo(8, 8 + i, fmt) for i in range(3) for fmt in FORMATS]
    texts = [encode(data, how) for data in images]
    cells = [{"bytes": None, "path": text} for text in texts] if struct else texts
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet", row_group_size=5)
    source = list_images(str(tmp_path))
    assert column(source, "key") == [f"x:{row}" for row in range(len(images))]
    assert read(source) == images
    small = read(source, max_bytes=len(images[0]) - 1)
    assert isinstance(small[0], ImageError)
    assert small[0].status == "too_large"


@given(st.binary(max_size=200))
def test_text_is_decoded_to_the_bytes_it_was_made_of(data: bytes) -> None:
    for how in ("plain", "unpadded", "urlsafe", "lines", "uri", "escaped uri", "percent"):
        assert inline_image(encode(data, how)) == data
    assert is_inline_image(encode(b"\xff\xd8\xff\xe0" + bytes(40) + data, "plain"))


@given(st.text(max_size=60))
def test_paths_are_no_images(text: str) -> None:
    for path in (f"{text}.jpg", f"/9j/{text}/a.png", f"s3://bucket/{text}"):
        assert path.lower().startswith("data:") or not is_inline_image(path)


def test_text_that_is_nothing(tmp_path: Path) -> None:
    good = encode(photo(8, 8), "plain")
    texts = [good[:-7] + "====", "data:image/png;base64,@@@", "x" * 200_000, good]
    pq.write_table(pa.table({"image": texts}), tmp_path / "x.parquet")
    source = list_images(str(tmp_path))
    assert column(source, "key") == ["x:0", "x:1", "x:2", "x:3"]
    outcomes = read(source)
    assert [getattr(outcome, "status", None) for outcome in outcomes[1:]] == ["corrupt", "unreadable", None]
    assert all(len(str(outcome)) < 500 for outcome in outcomes[1:3])


def test_keys_are_bounded_and_unique_over_folders(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / folder / "0.parquet")
    assert column(list_images(str(tmp_path)), "key") == ["a/0:0", "a/0:1", "b/0:0", "b/0:1"]
    ids = ["short", "long" * 1000, None, ""]
    pq.write_table(pa.table({"id": ids, "image": [b"1"] * 4}), tmp_path / "x.parquet")
    assert column(list_images(f"{tmp_path}/x.parquet"), "key") == ["short", "x:1", "x:2", "x:3"]


def columns(path: Path, *named: tuple[str, list[object]]) -> None:
    arrays = [pa.array(values) for _, values in named]
    pq.write_table(pa.Table.from_arrays(arrays, names=[name for name, _ in named]), path)


@pytest.mark.parametrize("name", ["image", "label", "id"])
def test_several_columns_of_one_name_that_is_needed(tmp_path: Path, name: str) -> None:
    both = {"image": [b"1"], "label": [1], "id": ["a"]}
    columns(tmp_path / "x.parquet", *both.items(), (name, both[name]))
    with pytest.raises(JobError, match=rf"x\.parquet: 2 columns are called '{name}' .of types .*expected one"):
        list_images(str(tmp_path))


def test_several_columns_of_one_name_that_is_not_needed(tmp_path: Path) -> None:
    text = ["x"]
    columns(
        tmp_path / "x.parquet", ("t", text), ("image", [b"1"]), ("t", text), ("label", [4]), ("jpg", [1]), ("jpg", [2])
    )
    source = list_images(str(tmp_path))
    assert (read(source), column(source, "label")) == ([b"1"], [4])
    columns(tmp_path / "x.parquet", ("image", [b"1"]), ("image", [b"2"]), ("photo", [b"3"]))
    assert read(list_images(str(tmp_path), image_column="photo")) == [b"3"]


def test_a_file_without_the_others_label_or_key(tmp_path: Path) -> None:
    columns(tmp_path / "0.parquet", ("image", [b"1"]), ("label", [4]), ("id", ["a"]))
    columns(tmp_path / "1.parquet", ("cls", [5]), ("image", [b"2"]))
    columns(tmp_path / "2.parquet", ("image", [b"3"]))
    (tmp_path / "notes.md").write_text("x")
    source = list_images(str(tmp_path))
    assert (column(source, "label"), column(source, "key")) == ([4, 5, None], ["a", "1:0", "2:0"])
    assert found(source, "other") == {"files that are not images (.md)": 1}


def test_a_large_text_column_is_not_read_for_keys(tmp_path: Path) -> None:
    texts = [base64.b64encode(b"\xff\xd8\xff" + bytes([i]) * 100_000).decode() for i in range(40)]
    pq.write_table(pa.table({"image": texts}), tmp_path / "x.parquet", compression="none", use_dictionary=False)
    list_images(str(tmp_path))
    before = int(Path("/proc/self/io").read_text().split()[1])
    assert column(list_images(str(tmp_path)), "key")[:2] == ["x:0", "x:1"]
    assert int(Path("/proc/self/io").read_text().split()[1]) - before < 300_000
