"""Files of labels by key: their names, and which keys have some."""

import functools
import http.server
import threading
from pathlib import Path

import pytest

from densefeat.storage.keyed_files import KeyedFiles
from densefeat.storage.objects import Objects


def files(folder: Path, *suffixes: str) -> KeyedFiles:
    return KeyedFiles(Objects(folder), "mask", *(suffixes or (".png",)))


def test_a_name_with_the_images_extension_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("1.jpg.png", "1.png", "2.png", "3.png", "3.npy"):
        (tmp_path / "a" / name).write_bytes(name.encode())
    own = files(tmp_path, ".npy", ".png")
    assert own.names("a/1.jpg") == ["a/1.jpg.npy", "a/1.jpg.png", "a/1.npy", "a/1.png"]
    assert [own.get(f"a/{key}.jpg")[1] for key in (1, 2, 3)] == [b"1.jpg.png", b"2.png", b"3.npy"]
    assert own.get("a/2") == ("a/2.png", b"2.png")
    with pytest.raises(FileNotFoundError, match=r"has no mask for 'a/4.jpg': expected a/4.jpg.npy or a/4.jpg.png or"):
        own.get("a/4.jpg")


@pytest.mark.parametrize("key", ["./a/1.jpg", "a//1.jpg", "a/./1.jpg", "a/1.jpg"])
def test_keys_that_are_written_otherwise(tmp_path: Path, key: str) -> None:
    """As in tars; a listing has names without "." and double slashes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"mask")
    own = files(tmp_path)
    assert own.get(key) == ("a/1.png", b"mask")
    assert (own.missing([key]), own.first([key])) == ([], key)


@pytest.mark.parametrize("labelled", [0, 5, 30])
def test_the_first_key_with_a_file(tmp_path: Path, labelled: int) -> None:
    keys = [f"{number:02}.jpg" for number in range(40)]
    (tmp_path / "other.png").write_bytes(b"")
    assert files(tmp_path).first(keys) is None
    for number in (labelled, 35):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    assert files(tmp_path).first(keys) == keys[labelled]
    assert files(tmp_path).missing(keys) == [key for key in keys if key not in (keys[labelled], keys[35])]


def test_folders_that_are_empty_or_missing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="has no files: expected masks named by key"):
            files(folder).first(["a"])


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    """With a suffix the key is too long for a file's name; without its extension it is not."""
    long = "t" * 250 + ".png"
    (tmp_path / long).write_bytes(b"1")
    assert files(tmp_path).first(["u" * 250 + ".png", long]) == long
    assert files(tmp_path).get(long) == (long, b"1")
    with pytest.raises(FileNotFoundError, match="has no mask for 'uu"):
        files(tmp_path).get("u" * 250 + ".png")


class _Closed(http.server.SimpleHTTPRequestHandler):
    """As a bucket that must not be listed: what is not there is forbidden."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        super().send_error(403 if code == 404 else code, message, explain)

    def log_message(self, *arguments: object) -> None:
        pass


def test_what_may_not_be_read_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Closed, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        own = KeyedFiles(Objects(f"http://127.0.0.1:{server.server_port}"), "mask", ".png")
        assert own.first(["closed/0.jpg", "1.jpg"]) == "1.jpg"
        assert own.first(["closed/0.jpg"]) is None
    finally:
        server.shutdown()
        server.server_close()
