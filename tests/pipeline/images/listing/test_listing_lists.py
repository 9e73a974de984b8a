"""Lists of images: text files, CSV and TSV tables."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densefeat.errors import PlaceError
from pipeline.errors import ImageError, JobError
from pipeline.images.listing.names import unescaped
from pipeline.images.listing.source import Source, list_images
from tests.helpers.datasets import column, put, read
from tests.helpers.photographs import photo

PHOTOS = {"a/1.jpg": photo(8, 8, "JPEG"), "b/2 2.png": photo(9, 8, "PNG"), "c.webp": photo(10, 8, "WEBP")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(str(tmp_path), PHOTOS)
    return tmp_path


def listed(folder: Path, name: str, content: str | bytes, **options: object) -> Source:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return list_images(str(folder / name), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text(folder: Path, end: str, mark: str) -> None:
    written = ["c.webp", f"{folder}/a/1.jpg", "b/2 2.png", "./a/../c.webp", f"file://{folder}/c.webp"]
    lines = [written[0], "", f"  {written[1]} ", "# not c.webp", *written[2:]]
    source = listed(folder, "photos.txt", mark + end.join(lines))
    meant = ("c.webp", "a/1.jpg", "b/2 2.png", "c.webp", "c.webp")
    assert source.kind == "list"
    assert column(source, "key") == written
    assert column(source, "uri") == [f"{folder}/{name}" for name in meant]
    assert column(source, "label") == [None] * 5
    assert source.candidates == 5
    assert read(source) == [PHOTOS[name] for name in meant]


def test_labels_after_paths(folder: Path) -> None:
    numbers = listed(folder, "train.txt", "a/1.jpg 7\nb/2 2.png\t0\nc.webp\n")
    assert column(numbers, "key") == ["a/1.jpg", "b/2 2.png", "c.webp"]
    assert (column(numbers, "label"), numbers.class_names) == ([7, 0, None], ())
    words = listed(folder, "words.lst", "a/1.jpg dog\nb/2 2.png cat\nc.webp dog\n")
    assert (column(words, "label"), words.class_names) == ([1, 0, 1], ("cat", "dog"))
    # A suffix at the end of the line: white space in the name.
    (folder / "x.jpg 3.jpg").write_bytes(PHOTOS["a/1.jpg"])
    assert column(listed(folder, "spaces.txt", "x.jpg 3.jpg\n"), "key") == ["x.jpg 3.jpg"]


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("T.TSV", "\t")])
def test_tables(folder: Path, name: str, delimiter: str) -> None:
    rows = [["note", "label", "path", "id"], ["x", "dog", "a/1.jpg", "one"], ["", "", '"b/2 2.png"', "two"]]
    source = listed(folder, name, "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n")
    assert (source.kind, source.image_column) == ("list", "path")
    assert column(source, "key") == ["one", "two"]
    assert (column(source, "label"), source.class_names) == ([0, None], ("dog",))
    assert read(source) == [PHOTOS["a/1.jpg"], PHOTOS["b/2 2.png"]]


def test_a_column_may_be_named(folder: Path) -> None:
    text = "path,small\na/1.jpg,c.webp\n"
    assert column(listed(folder, "x.csv", text), "key") == ["a/1.jpg"]
    assert column(listed(folder, "x.csv", text, image_column="small"), "key") == ["c.webp"]


def test_quoted_fields_hold_delimiters_and_lines(folder: Path) -> None:
    (folder / "a,b\nc.jpg").write_bytes(PHOTOS["a/1.jpg"])
    source = listed(folder, "x.csv", 'path,label\n"a,b\nc.jpg","one, ""two"""\n')
    assert read(source) == [PHOTOS["a/1.jpg"]]
    assert source.class_names == ('one, "two"',)


def test_names_that_are_not_utf8(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (folder / name).write_bytes(PHOTOS["a/1.jpg"])
    for list_name, content in (("x.txt", b"caf\xe9.jpg\n"), ("x.csv", b"path,label\ncaf\xe9.jpg,caf\xe9\n")):
        source = listed(folder, list_name, content)
        assert column(source, "key") == [r"caf\xe9.jpg"]
        assert unescaped(column(source, "uri")[0]) == f"{folder}/{name}"
        assert read(source) == [PHOTOS["a/1.jpg"]]
    assert source.class_names == (r"caf\xe9",)


def test_what_is_missing_fails_its_row(folder: Path) -> None:
    source = listed(folder, "x.txt", "a/1.jpg\nnone.jpg\n")
    first, second = read(source)
    assert first == PHOTOS["a/1.jpg"]
    assert isinstance(second, ImageError)
    assert second.status == "unreadable"


def test_rows_without_an_image_are_counted(folder: Path) -> None:
    source = listed(folder, "x.csv", "path,label\na/1.jpg,1\n ,2\n,3\nc.webp,4\n")
    assert (column(source, "key"), column(source, "label")) == (["a/1.jpg", "c.webp"], [1, 4])
    (finding,) = source.findings
    assert (finding.about, finding.count) == ("image", 2)
    assert source.candidates == 4


def test_limit_and_repetition(folder: Path) -> None:
    source = listed(folder, "x.txt", "a/1.jpg\na/1.jpg\nc.webp\n", limit=2)
    assert column(source, "key") == ["a/1.jpg", "a/1.jpg"]
    assert source.candidates == 3


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("x.txt", "", {}, "the list has no images"),
        ("x.txt", "Photographs of 2019.\nAll rights reserved.\n", {}, "first line is 'Photographs of 2019.'"),
        ("x.txt", "a/1.jpg\n", {"image_column": "path"}, "a text file has no columns"),
        ("x.csv", "", {}, "columns of an empty file"),
        ("x.csv", "path\n", {}, "the list has no images"),
        ("x.csv", "name,label\na/1.jpg,1\n", {}, r"columns name, label; .*--image-column"),
        ("x.csv", "a/1.jpg,1\nc.webp,2\n", {}, r"columns a/1.jpg, 1; .*The first line must name the columns"),
        ("x.csv", "path\na/1.jpg\n", {"image_column": "image"}, "expected image. The"),
        ("x.csv", "path,label\na/1.jpg,1\nc.webp\n", {}, "line 3 has 1 fields, the header 2"),
        ("x.csv", "path,path\na/1.jpg,1\n", {}, "several columns are named path"),
        ("x.csv", 'path\n"a/1.jpg\n', {}, "line 2 cannot be parsed"),
    ],
)
def test_lists_that_are_refused(folder: Path, name: str, content: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(JobError, match=words):
        listed(folder, name, content, **options)


def test_missing_lists_and_slips_are_refused(folder: Path) -> None:
    with pytest.raises(JobError, match=r"none\.txt does not exist"):
        list_images(f"{folder}/none.txt")
    for slip in ("s4://bucket/1.jpg", "s3:/bucket/1.jpg", "s3://"):
        with pytest.raises(PlaceError, match=r"x\.txt.*s[34]:"):
            listed(folder, "x.txt", f"a/1.jpg\n{slip}\n")


def test_lists_among_images_are_not_read(folder: Path) -> None:
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "labels.csv").write_text("path\nnone.jpg\n")
    source = list_images(str(folder))
    assert source.kind == "folder"
    assert len(column(source, "key")) == len(PHOTOS)


@pytest.mark.s3
def test_images_in_several_storages(folder: Path, s3_bucket: str) -> None:
    put(f"{s3_bucket}/data", PHOTOS)
    lines = f"a/1.jpg\n{folder}/c.webp\n{s3_bucket}/data/b/2 2.png\n"
    put(f"{s3_bucket}/data", {"photos.txt": lines.encode()})
    source = list_images(f"{s3_bucket}/data/photos.txt")
    assert column(source, "uri") == [
        f"{s3_bucket}/data/a/1.jpg", f"{folder}/c.webp", f"{s3_bucket}/data/b/2 2.png",
    ]  # fmt: skip
    assert read(source) == [PHOTOS[name] for name in ("a/1.jpg", "c.webp", "b/2 2.png")]
    here = listed(folder, "x.txt", f"c.webp\n{s3_bucket}/data/a/1.jpg\n")
    assert read(here) == [PHOTOS[name] for name in ("c.webp", "a/1.jpg")]


@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1), max_size=5)
)
def test_any_name_survives_a_table(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    import csv

    folder = tmp_path_factory.mktemp("lists")
    wanted = [f"x{name}.jpg" for name in names]
    with (folder / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in wanted)])
    if wanted:
        assert [unescaped(uri) for uri in column(list_images(f"{folder}/x.csv"), "uri")] == [
            f"{folder}/{name}" for name in wanted
        ]
