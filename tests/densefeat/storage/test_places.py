"""A text and the place it names: the same for whoever lists, writes, compares or deletes."""

import os
import zipfile
from pathlib import Path, PurePosixPath

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from densefeat.errors import PlaceError
from densefeat.storage.objects import Objects
from densefeat.storage.places import absolute_place, encloses, is_local, open_place, open_uri, split_place

# Names that file systems and buckets allow and that URIs, shells or fsspec give a meaning.
NAMES = (
    "plain", "run::2", "a b", " lead", "trail ", "100%", "a%20b", "a#b", "a?b", "a&b=c", "[x]", "{1,2}", "*", "é",
    "e\u0301", "写真", "a:b", "a\\b", "C:\\data", "~", "~nobody-of-this-name", ".hidden", "...", "-", "a;b", "'q'",
    '"q"', "s3:", "$HOME", "x" * 200, "a::b::c", "zip::x",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_local_name_is_the_file_of_that_name(here: Path, name: str) -> None:
    """Against Python's own idea of paths: what is written by `Objects` is where ``open`` finds it, and nowhere else."""
    folder = here / "top" / name
    texts = [
        str(folder),
        f"{here}//top///{name}/",
        f"{here}/top/./x/../{name}",
        f"file://{folder}",
        f"FILE://{folder}//",
    ]
    texts += [f"top/{name}", f"./top/{name}/", f"file:{folder}", f"local://{folder}", f"file://localhost{folder}"]
    for text in texts:
        assert absolute_place(text) == str(folder), text
        assert is_local(text) or text.startswith("file:/")
        filesystem, path = open_place(text)
        assert isinstance(filesystem, LocalFileSystem)
        assert path == str(folder)
    assert absolute_place(folder) == absolute_place(PurePosixPath(folder)) == str(folder)
    Objects(texts[0]).put("key", name.encode())
    assert (folder / "key").read_bytes() == name.encode()
    assert [Objects(text).get("key") for text in texts] == [name.encode()] * len(texts)
    assert [path.name for path in (here / "top").iterdir()] == [name]
    assert split_place(folder / "key") == (str(folder), "key")
    assert absolute_place(absolute_place(folder)) == absolute_place(folder)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("~", "{home}"), ("~/a", "{home}/a"), ("file://~/a", "{home}/a"), ("./~", "{here}/~"), ("~~", "{here}/~~"),
        ("~nobody-of-this-name/a", "{here}/~nobody-of-this-name/a"), (".", "{here}"), ("/", "/"), ("//", "/"),
        ("//a//b", "/a/b"), ("///a", "/a"), ("file:////a", "/a"), ("..", "{up}"), ("/../a", "/a"), ("file:///", "/"),
        ("file://localhost/", "/"), ("file://localhost", "/"), ("a/../../b", "{up}/b"), ("./s3:/b/x", "{here}/s3:/b/x"),
        ("/data/s3://b", "/data/s3:/b"), ("./s3://b", "{here}/s3:/b"), ("C:\\data", "{here}/C:\\data"),
        ("run::2", "{here}/run::2"), ("run::s3://b/x", "{here}/run::s3:/b/x"), ("zip::a.zip", "{here}/zip::a.zip"),
        ("file://a::b", "{here}/a::b"), ("data:2024", "{here}/data:2024"), ("s3", "{here}/s3"),
    ],
)  # fmt: skip
def test_local_texts(here: Path, text: str, place: str) -> None:
    assert absolute_place(text) == place.format(home=here / "home", here=here, up=here.parent)


@pytest.mark.parametrize(
    ("text", "place", "folder", "name"),
    [
        ("s3://b", "s3://b", None, ""), ("s3://b/", "s3://b", None, ""), ("s3://b//", "s3://b", None, ""),
        ("s3:///b/x", "s3://b/x", "s3://b", "x"), ("S3://b/X", "s3://b/X", "s3://b", "X"),
        ("s3://b//x", "s3://b/x", "s3://b", "x"), ("s3://b/x//y///", "s3://b/x/y", "s3://b/x", "y"),
        ("s3://b/./x/.", "s3://b/x", "s3://b", "x"), ("s3://b/a/../x", "s3://b/x", "s3://b", "x"),
        ("s3://b/x::y", "s3://b/x::y", "s3://b", "x::y"),
        ("s3://b/a b%20#?é", "s3://b/a b%20#?é", "s3://b", "a b%20#?é"),
        ("s3a://b/x", "s3a://b/x", "s3a://b", "x"), ("gs://b//x/", "gs://b/x", "gs://b", "x"),
        ("memory://a/b/", "memory://a/b", "memory://a", "b"), ("memory:///a//b", "memory://a/b", "memory://a", "b"),
        ("memory://a", "memory://a", "memory://", "a"), ("hdfs:///user/x/", "hdfs:///user/x", "hdfs:///user", "x"),
        ("hdfs://host:80//x", "hdfs://host:80/x", "hdfs://host:80", "x"),
        ("https://h/a//b?c=1&d=e", "https://h/a//b?c=1&d=e", "https://h/a/", "b?c=1&d=e"),
        ("http://h/a/../b/", "http://h/a/../b", "http://h/a/..", "b"),
        ("zip://a//b.pt::s3://k//z.zip", "zip://a/b.pt::s3://k/z.zip", "zip://a::s3://k/z.zip", "b.pt"),
        ("zip://b.pt::z.zip", "zip://b.pt::{here}/z.zip", "zip://::{here}/z.zip", "b.pt"),
        ("tar://x/*.jpg::~/t.tar", "tar://x/*.jpg::{here}/home/t.tar", "tar://x::{here}/home/t.tar", "*.jpg"),
        ("zip://::file:///z.zip", "zip://::/z.zip", None, ""),
    ],
)  # fmt: skip
def test_uris(here: Path, text: str, place: str, folder: str | None, name: str) -> None:
    place = place.format(here=here)
    assert absolute_place(text) == absolute_place(place) == place
    assert not is_local(text)
    if folder is None:
        with pytest.raises(PlaceError, match="names no file"):
            split_place(text)
    else:
        assert split_place(text) == (folder.format(here=here), name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a path or URI"), ("  ", "is not a path or URI"), ("file://", "has no path"),
        ("a\0b", "null character"),
        ("s3://", "names no bucket"), ("s3:///", "names no bucket"), ("gs:////", "names no bucket"),
        ("s3://b/..", "leads above"), ("s3://b/a/../../c", "leads above"), ("s3:/b/x", r"write s3://b/x \(as a str"),
        ("GS:/b", "GS://b"), (Path("s3://b/x"), "pathlib.Path drops a slash"), (" s3://b/x", "begins with whitespace"),
        ("\ts3://b", "begins with whitespace"), ("zip://a.jpg::", "is incomplete"),
    ],
)  # fmt: skip
def test_slips_are_refused(here: Path, text: str | Path, words: str) -> None:
    for function in (absolute_place, open_place, split_place, Objects):
        with pytest.raises(PlaceError, match=words):
            function(text)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("text", ["foo://b/x", "s4://b", "foo://b::c", "c://data"])
def test_unknown_protocols_are_refused(text: str) -> None:
    with pytest.raises(PlaceError, match="unknown protocol"):
        open_place(text)


def test_bytes_name_no_place() -> None:
    with pytest.raises(TypeError, match="str"):
        absolute_place(b"photos")  # type: ignore[arg-type]


def test_an_objects_slashes_are_part_of_its_name() -> None:
    filesystem, path = open_uri("s3://bucket/a//b/")
    assert path == "bucket/a//b"
    assert type(filesystem).__name__ == "S3FileSystem"
    assert open_uri("https://host/a//b?c#d")[1] == "https://host/a//b?c#d"


def test_a_member_of_an_archive_is_read_from_any_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with zipfile.ZipFile("z.zip", "w") as archive:
        archive.writestr("a/b.txt", "in a zip")
    place = absolute_place("zip://a/b.txt::z.zip")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    folder, name = split_place(place)
    objects = Objects(folder)
    assert objects.get(name) == b"in a zip"
    assert objects.get_range(name, 3, 4) == b"a"
    assert objects.list() == {"b.txt": 8}
    assert Objects(f"zip://::{here}/z.zip").list() == {"a/b.txt": 8}


@pytest.mark.s3
def test_a_prefix_on_s3_is_what_the_server_calls_it(s3_bucket: str) -> None:
    """One client each: making one takes seconds, which is why all the odd names are in one."""
    import boto3

    bucket = s3_bucket.removeprefix("s3://")
    name = "x::y/a b/a%20b#c/é+写真/a&b=c;[x]{1,2}*"
    objects = Objects(f"S3:///{bucket}//./{name}//")
    objects.put("a/b", b"here")
    objects.create("c", b"there")
    listed = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).list_objects_v2(Bucket=bucket)
    assert [item["Key"] for item in listed["Contents"]] == [f"{name}/a/b", f"{name}/c"]
    assert objects.uri == f"{s3_bucket}/{name}"
    assert objects.list() == {"a/b": 4, "c": 5}
    assert objects.list("a") == {"a/b": 4}
    assert (objects.get("a/b"), objects.get_range("c", 1, 3), objects.size("a")) == (b"here", b"he", None)
    objects.delete("c")
    assert Objects(s3_bucket).list() == {f"{name}/a/b": 4}


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("/a", "/a", True), ("/a", "/a/b/c", True), ("/a/b", "/a", False), ("/a", "/ab", False), ("/", "/a", True),
        ("a", "file:///{here}/a/b", True), ("s3://b", "s3://b/x", True), ("s3://b/x", "s3://b/xy", False),
        ("s3://b//x/", "s3a://b/x/y", True), ("gs://b/x", "gcs://b/x", True), ("s3://b/x", "gs://b/x", False),
        ("s3://b/x", "/b/x", False), ("s3://b/x/../y", "s3://b/y/z", True), ("memory://a", "memory:///a/b", True),
        ("link", "{here}/a/c", True), ("a", "link/c", True), ("link/..", "a", True), ("/a::b", "/a::b/c", True),
    ],
)  # fmt: skip
def test_what_lies_in_what(here: Path, outer: str, inner: str, expected: bool) -> None:
    (here / "a").mkdir()
    (here / "link").symlink_to(here / "a")
    assert encloses(outer.format(here=here), inner.format(here=here)) is expected


def test_the_memory_file_system_has_no_buckets() -> None:
    fsspec.filesystem("memory").store.clear()
    Objects("memory://").put("a/b", b"1")
    assert Objects("memory://a").list() == {"b": 1}
    assert Objects("memory:///").list() == {"a/b": 1}
