"""Folders and web servers as references, and what is said of a dataset that cannot be listed."""

import functools
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from densefeat.errors import PlaceError
from pipeline.errors import ImageError, JobError
from pipeline.images.listing.source import list_images
from schemas.index import REFERENCES
from tests.helpers.datasets import column, put, read, tar_of


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
        with pytest.raises(JobError, match="no permission to read: Access Denied"):
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
