"""Datasets as references and back to bytes: every kind, local and remote, whole and broken."""

import functools
import http.server
import importlib.util
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from densefeat.errors import PlaceError
from pipeline.errors import ImageError, JobError
from pipeline.images.listing.source import Source, list_images
from pipeline.images.reading.read import read_images
from schemas.index import REFERENCES
from tests.helpers.photographs import photo

PHOTO = photo(16, 16)


def put(root: str, files: dict[str, bytes]) -> None:
    filesystem, path = fsspec.core.url_to_fs(root)
    for name, data in files.items():
        filesystem.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{path}/{name}", data)


def tar_of(members: dict[str, bytes], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def column(source: Source, name: str) -> list[object]:
    return source.references[name].to_pylist()


def read(source: Source, start: int = 0, count: int | None = None, **options: object) -> list[bytes | ImageError]:
    with ThreadPoolExecutor(4) as pool:
        rows = source.references.slice(start, count)
        return list(read_images(rows, image_column=source.image_column, kind=source.kind, pool=pool, **options))


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for a dataset on each kind of storage."""
    if request.param == "local":
        yield str(tmp_path)
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    else:
        yield request.getfixturevalue("s3_bucket") + "/data"


class TestFolder:
    def test_order_keys_labels_and_bytes(self, root: str) -> None:
        files = {
            "b/2.JPG": b"two",
            "b/10.png": b"ten",
            "a/x.jpeg": b"x",
            "a/._x.jpeg": b"mac",
            ".hid/y.jpg": b"h",
            "README": b"",
        }
        put(root, files)
        source = list_images(root)
        assert source.kind == "folder"
        assert source.references.schema == REFERENCES
        assert column(source, "key") == ["a/x.jpeg", "b/10.png", "b/2.JPG"]
        assert column(source, "label") == [0, 1, 1]
        assert source.class_names == ("a", "b")
        assert column(source, "nbytes") == [1, 3, 3]
        assert read(source) == [b"x", b"ten", b"two"]
        assert read(source, 1, 1) == [b"ten"]

    def test_no_labels_unless_every_image_is_one_folder_deep(self, root: str) -> None:
        put(root, {"a/1.jpg": b"1", "2.jpg": b"2"})
        source = list_images(root)
        assert column(source, "label") == [None, None]
        assert source.class_names == ()

    def test_a_file_a_glob_and_braces(self, root: str) -> None:
        put(root, {"a/1.jpg": b"1", "a/2.png": b"2", "b/3.jpg": b"3", "c/4.jpg": b"4"})
        assert column(list_images(f"{root}/a/1.jpg"), "key") == ["1.jpg"]
        assert column(list_images(f"{root}/*/*.jpg"), "key") == ["a/1.jpg", "b/3.jpg", "c/4.jpg"]
        braces = list_images(f"{root}/{{b,a}}")
        assert column(braces, "key") == ["a/1.jpg", "a/2.png", "b/3.jpg"]
        assert braces.class_names == ("a", "b")
        assert read(braces) == [b"1", b"2", b"3"]

    def test_uris_are_absolute_and_odd_names_survive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ["a::b.jpg", "c%20d.jpg", "e#f?.jpg", "{g}.jpg", "[h].jpg", "ü ~.jpg"]
        put(str(tmp_path / "set[1]"), {name: name.encode() for name in names})
        monkeypatch.chdir(tmp_path)
        source = list_images("set[1]")
        assert column(source, "uri") == [f"{tmp_path}/set[1]/{name}" for name in sorted(names)]
        assert read(source) == [name.encode() for name in sorted(names)]

    def test_links_are_followed_and_loops_are_not(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"real/a/1.jpg": b"1", "other/2.jpg": b"2"})
        (tmp_path / "real/linked").symlink_to(tmp_path / "other")
        (tmp_path / "real/a/up").symlink_to(tmp_path / "real")
        (tmp_path / "real/broken.jpg").symlink_to(tmp_path / "gone")
        source = list_images(str(tmp_path / "real"))
        assert column(source, "key") == ["a/1.jpg", "broken.jpg", "linked/2.jpg"]
        one, broken, two = read(source)
        assert (one, two) == (b"1", b"2")
        assert isinstance(broken, ImageError)
        assert broken.status == "unreadable"

    def test_limit(self, root: str) -> None:
        put(root, {f"{index}.jpg": b"" for index in range(5)})
        assert column(list_images(root, limit=2), "key") == ["0.jpg", "1.jpg"]
        with pytest.raises(ValueError, match="limit=0"):
            list_images(root, limit=0)


class TestTar:
    def test_samples_labels_and_bytes(self, root: str) -> None:
        long = "train/" + "n" * 150
        put(root, {
            "0.tar": tar_of({"a.cls": b"7\n", "a.seg.png": b"mask", "a.png": b"p", "a.JPG": b"a" * 700, "b.jpg": b"b"}),
            "1.tar": tar_of({"._c.jpg": b"mac", f"{long}.v1.jpg": b"ccc", f"{long}.json": b"{}"}, tarfile.GNU_FORMAT),
            "notes.txt": b"",
        })  # fmt: skip
        for images in (root, f"{root}/*.tar", f"{root}/{{0..1}}.tar"):
            source = list_images(images)
            assert source.kind == "tar"
            assert column(source, "key") == ["a", "b", long]
            assert column(source, "label") == [7, None, None]
            assert column(source, "nbytes") == [700, 1, 3]
            assert read(source) == [b"a" * 700, b"b", b"ccc"]
        assert read(list_images(root, image_column="seg.png")) == [b"mask"]
        assert column(list_images(f"{root}/{{1,0}}.tar", limit=2), "key") == [long, "a"]

    def test_limit_opens_no_further_tar(self, root: str) -> None:
        put(root, {"0.tar": tar_of({"a.jpg": b"a", "b.jpg": b"b"}), "1.tar": b"broken"})
        assert column(list_images(root, limit=2), "key") == ["a", "b"]
        with pytest.raises(JobError, match=r"1\.tar: truncated or damaged at or after byte 0"):
            list_images(root)

    @pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1536, 1700])
    def test_truncated(self, tmp_path: Path, cut: int) -> None:
        (tmp_path / "x.tar").write_bytes(tar_of({"a.jpg": b"a" * 600, "b.jpg": b"b" * 500})[:cut])
        with pytest.raises(JobError, match=r"x\.tar: truncated or damaged at or after byte \d+"):
            list_images(str(tmp_path / "x.tar"))

    def test_damaged_header(self, tmp_path: Path) -> None:
        data = bytearray(tar_of({"a.jpg": b"a" * 512, "b.jpg": b"b"}))
        data[1024:1030] = b"\xffwrong"
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(JobError, match=r"byte 1024 .no valid header"):
            list_images(str(tmp_path))

    @pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
    def test_compressed(self, tmp_path: Path, name: str) -> None:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
        with pytest.raises(JobError, match=r"compressed with gzip.*Decompress"):
            list_images(str(tmp_path / name))

    def test_a_tar_that_shrank_after_listing(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tar"
        path.write_bytes(tar_of({"a.jpg": b"a" * 600, "b.jpg": b"b" * 500}))
        source = list_images(str(path))
        path.write_bytes(path.read_bytes()[:2100])
        a, b = read(source)
        assert a == b"a" * 600
        assert isinstance(b, ImageError)
        assert "got 52 of the 500 bytes" in str(b)

    def test_neighbours_are_read_together_and_distant_members_are_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        members = {f"{index}.jpg": bytes([index]) * 100 for index in range(6)} | {
            "gap.txt": bytes(70 << 10),
            "z.jpg": b"z",
        }
        put("memory://near", {"x.tar": tar_of(members)})
        source = list_images("memory://near/x.tar")
        requests: list[tuple[int, int]] = []
        original = MemoryFileSystem.cat_file

        def counted(self, path, start=None, end=None, **options):
            requests.append((start, end))
            return original(self, path, start, end, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
        assert read(source) == [bytes([index]) * 100 for index in range(6)] + [b"z"]
        assert len(requests) == 2

    def test_a_label_that_is_text_is_the_name_of_a_class(self, tmp_path: Path) -> None:
        (tmp_path / "x.tar").write_bytes(tar_of({"a.jpg": b"a", "a.cls": b"cat"}))
        source = list_images(str(tmp_path))
        assert column(source, "label") == [0]
        assert source.class_names == ("cat",)


class TestParquet:
    def test_bytes_keys_and_labels(self, root: str) -> None:
        features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        table = pa.table({"id": [10, 11, 12], "jpg": [b"a", None, b"c"], "label": [1, -1, 0]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        put(root, {"x.parquet": parquet_of(table)})
        source = list_images(root)
        assert (source.kind, source.image_column, source.class_names) == ("parquet", "jpg", ("cat", "dog"))
        assert column(source, "key") == ["10", "11", "12"]
        assert column(source, "label") == [1, None, 0]
        a, null, c = read(source)
        assert (a, c) == (b"a", b"c")
        assert isinstance(null, ImageError)
        assert "null" in str(null)

    def test_hugging_face_structs_and_uris(self, root: str) -> None:
        images = [
            {"bytes": b"in", "path": "in.jpg"},
            {"bytes": None, "path": "sub/1.jpg"},
            {"bytes": b"", "path": None},
        ]
        put(root, {"x.parquet": parquet_of(pa.table({"image": images})), "sub/1.jpg": b"one", "2.jpg": b"two"})
        source = list_images(f"{root}/x.parquet")
        assert column(source, "key") == ["in.jpg", "sub/1.jpg", "x:2"]
        assert read(source) == [b"in", b"one", b""]
        put(root, {"y.parquet": parquet_of(pa.table({"url": [f"{root}/2.jpg", "sub/1.jpg", "gone.jpg", None]}))})
        two, one, gone, null = read(list_images(f"{root}/y.parquet"))
        assert (two, one) == (b"two", b"one")
        assert isinstance(gone, ImageError)
        assert isinstance(null, ImageError)

    @pytest.mark.parametrize("ahead", [1, 5, 64])
    def test_slices_across_row_groups_and_files(self, tmp_path: Path, ahead: int) -> None:
        cells = [f"{index}".encode() for index in range(100)]
        for name, part in (("0", cells[:60]), ("1", cells[60:])):
            pq.write_table(pa.table({"image": part, "other": part}), tmp_path / f"{name}.parquet", row_group_size=7)
        source = list_images(str(tmp_path))
        assert column(source, "key")[59:61] == ["0:59", "1:0"]
        assert read(source, ahead=ahead) == cells
        assert read(source, 33, 40, ahead=ahead) == cells[33:73]
        picked = Source("parquet", source.references.take([80, 3, 4, 50, 3]), (), "image")
        assert read(picked, ahead=ahead) == [cells[index] for index in (80, 3, 4, 50, 3)]
        assert column(list_images(str(tmp_path), limit=61), "key")[-1] == "1:0"

    def test_no_image_column(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [1], "text": ["x"]}), tmp_path / "x.parquet")
        with pytest.raises(JobError, match=r"no image column.*image: int64, text: string"):
            list_images(str(tmp_path))
        with pytest.raises(JobError, match="Expected 'photo'"):
            list_images(str(tmp_path), image_column="photo")
        assert list_images(str(tmp_path), image_column="text").image_column == "text"

    def test_files_that_differ_or_are_broken(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "0.parquet")
        pq.write_table(pa.table({"png": [b"1"]}), tmp_path / "1.parquet")
        with pytest.raises(JobError, match=r"1\.parquet: no image column"):
            list_images(str(tmp_path))
        (tmp_path / "1.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(JobError, match=r"1\.parquet: truncated, damaged, or not Parquet"):
            list_images(str(tmp_path))

    def test_a_file_that_changed_after_listing(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [b"1", b"2"]}), path)
        source = list_images(str(path))
        pq.write_table(pa.table({"image": [b"1"]}), path)
        assert [getattr(outcome, "status", None) for outcome in read(source)] == ["unreadable", "unreadable"]


class TestErrors:
    @pytest.mark.parametrize(
        ("files", "images", "message"),
        [
            ({}, "gone", "gone does not exist"),
            ({"a.txt": b"", "b.TXT": b""}, "", r"no images found. Got 2 visible file\(s\): .txt \(2\); expected"),
            ({"a.jpg": b"", "b.tar": b"", "c.parquet": b""}, "", "mixed kinds: got 1 of kind folder, 1 of"),
            ({"0.jpg": b""}, "{0..1}.jpg", r"1.jpg does not exist.*brace"),
            ({"0.tar": tar_of({"a.txt": b""})}, "", r"no images found in 1 tar file"),
        ],
    )  # fmt: skip
    def test_text(self, root: str, files: dict[str, bytes], images: str, message: str) -> None:
        put(root, {"x/.keep": b"", **{f"x/{name}": data for name, data in files.items()}})
        with pytest.raises(JobError, match=message):
            list_images(f"{root}/x/{images}".rstrip("/"))

    def test_unknown_protocol(self) -> None:
        with pytest.raises(PlaceError, match="unknown protocol nonsense://"):
            list_images("nonsense://x")

    @pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
    def test_missing_package(self) -> None:
        with pytest.raises(JobError, match=r"densefeat\[gcs\]"):
            list_images("gs://x")

    def test_permission(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            raise PermissionError("Access Denied")

        monkeypatch.setattr(MemoryFileSystem, "info", refuse)
        with pytest.raises(JobError, match="not allowed to read: Access Denied"):
            list_images("memory://x")

    @pytest.mark.s3
    def test_no_s3_credentials(self, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(JobError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
            list_images(f"{s3_bucket}/data")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


class TestHttp:
    def test_folder_and_file(self, web: str, tmp_path: Path) -> None:
        put(str(tmp_path), {"set/a/1.jpg": b"1", "set/b/2.jpg": b"2"})
        source = list_images(f"{web}/set/")
        assert column(source, "key") == ["a/1.jpg", "b/2.jpg"]
        assert read(source) == [b"1", b"2"]
        assert read(list_images(f"{web}/set/a/1.jpg")) == [b"1"]
        with pytest.raises(JobError, match="does not exist"):
            list_images(f"{web}/gone.jpg")


class CountingPool(ThreadPoolExecutor):
    """Counts what was submitted."""

    submitted = 0

    def submit(self, *arguments, **options) -> Future:
        self.submitted += 1
        return super().submit(*arguments, **options)


class TestReading:
    @pytest.mark.parametrize("ahead", [1, 3, 16])
    def test_reads_no_further_ahead_than_asked(self, tmp_path: Path, ahead: int) -> None:
        put(str(tmp_path), {f"{index:02}.jpg": str(index).encode() for index in range(40)})
        source = list_images(str(tmp_path))
        with CountingPool(2) as pool:
            outcomes = read_images(source.references, image_column=None, kind="folder", pool=pool, ahead=ahead)
            for consumed in range(1, 20):
                assert next(outcomes) == str(consumed - 1).encode()
                assert pool.submitted <= consumed + ahead
            outcomes.close()

    def test_empty_missing_and_too_large(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"0.jpg": b"", "1.jpg": b"1", "2.jpg": b"2" * 100})
        source = list_images(str(tmp_path))
        (tmp_path / "1.jpg").unlink()
        empty, missing, large = read(source, max_bytes=99)
        assert empty == b""
        assert isinstance(missing, ImageError)
        assert missing.status == "unreadable"
        assert isinstance(large, ImageError)
        assert large.status == "too_large"

    def test_references_survive_parquet_and_another_process(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"0.tar": tar_of({"a.jpg": PHOTO})})
        source = list_images(str(tmp_path))
        pq.write_table(source.references, tmp_path / "index.parquet")
        again = Source("tar", pq.read_table(tmp_path / "index.parquet"), (), None)
        assert read(again) == [PHOTO]

    def test_bad_arguments(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            nothing = REFERENCES.empty_table()
            with pytest.raises(ValueError, match="ahead=0"):
                read_images(nothing, image_column=None, kind="folder", pool=pool, ahead=0)
            with pytest.raises(ValueError, match="image_column"):
                read_images(nothing, image_column=None, kind="parquet", pool=pool)
            assert list(read_images(nothing, image_column="image", kind="parquet", pool=pool)) == []
