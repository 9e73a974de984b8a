"""Folders and patterns: links, hidden files, overlaps, names that are not UTF-8, what is left out and refused."""

import glob
import os
import tempfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import ImageError, JobError
from pipeline.images.listing.findings import describe_findings, refuse_losses
from pipeline.images.listing.names import escaped, looks_like_image, unescaped
from pipeline.images.listing.source import list_images
from schemas.index import INDEX, pending_index
from tests.helpers.datasets import by_key, column, found, read


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Images in folders, linked folders and hidden ones."""
    root = tmp_path / "root"
    for name in ("a/1.jpg", "a/b/2.jpg", "c/3.JPG", "c/.hidden.jpg", ".git/4.jpg", "c/5.jpg.d/6.jpg", "7.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (tmp_path / "other/deep").mkdir(parents=True)
    (tmp_path / "other/deep/8.jpg").write_bytes(b"8")
    (root / "linked").symlink_to("../other")
    (root / "a/up").symlink_to("..")
    (root / "gone.jpg").symlink_to("nothing.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    return root


KEYS = ["7.jpg", "a/1.jpg", "a/b/2.jpg", "c/3.JPG", "c/5.jpg.d/6.jpg", "gone.jpg", "linked/deep/8.jpg", "self.jpg"]


def test_a_folder_with_links(tree: Path) -> None:
    source = list_images(str(tree))
    assert column(source, "key") == KEYS
    images = by_key(source)
    assert (images["linked/deep/8.jpg"], images["gone.jpg"], images["self.jpg"]) == (b"8", "unreadable", "unreadable")
    assert found(source, "row") == {"files that cannot be accessed, such as broken links": 2}
    assert found(source, "other") == {
        "hidden files with an image's name": 1,
        "hidden folders, not entered": 1,
        "links to a folder that contains them": 1,
    }


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*", "{a,c,linked,*.jpg}", "{*,*/*,7.jpg}", "[acgls7]*"])
def test_patterns_that_name_everything_agree_with_the_folder(tree: Path, pattern: str) -> None:
    source = list_images(f"{tree}/{pattern}".rstrip("/"))
    assert column(source, "key") == KEYS
    assert read(source)[:3] == [b"7.jpg", b"a/1.jpg", b"a/b/2.jpg"]


@pytest.mark.parametrize(
    "pattern",
    ["*.jpg", "*/*.jpg", "*/*/*.jpg", "a/?.jpg", "c/.*.jpg", ".git/*.jpg", "[a-c]/*.[jJ]??", "linked/*/8.jpg", "*/.*"],
)
def test_patterns_name_the_files_that_a_shell_names(tree: Path, pattern: str) -> None:
    names = [path for path in glob.glob(f"{tree}/{pattern}") if not os.path.isdir(path)]
    assert sorted(column(list_images(f"{tree}/{pattern}"), "uri")) == sorted(names)


def test_two_stars_enter_linked_folders_once(tree: Path) -> None:
    keys = column(list_images(f"{tree}/**/*.jpg"), "key")
    assert keys == [key for key in KEYS if key.endswith(".jpg")]


def test_overlapping_alternatives_give_a_file_once(tree: Path) -> None:
    source = list_images(f"{tree}/a/{{1*,*.jpg,1.jpg}}")
    assert column(source, "key") == ["1.jpg"]
    assert found(source, "other") == {"files that the pattern names more than once, used once": 2}


@pytest.mark.parametrize("protocol", ["memory", pytest.param("s3", marks=pytest.mark.s3)])
def test_remote_patterns(request: pytest.FixtureRequest, protocol: str) -> None:
    root = "memory://patterns" if protocol == "memory" else f"{request.getfixturevalue('s3_bucket')}/patterns"
    filesystem, path = fsspec.core.url_to_fs(root)
    for name in ("a/1.jpg", "a/b/2.jpg", "c/3.jpg", "c/.h.jpg", ".git/4.jpg", "5.jpg", "c/6.heic"):
        filesystem.pipe_file(f"{path}/{name}", name.encode())
    keys = ["5.jpg", "a/1.jpg", "a/b/2.jpg", "c/3.jpg"]
    for pattern in ("", "/*", "/**", "/{*,a/*,a/b,c/3.jpg}"):
        source = list_images(root + pattern)
        assert column(source, "key") == keys
        assert found(source, "image") == {"images of an unsupported format (.heic)": 1}
        assert sum(found(source, "other").values()) >= 1
    assert column(list_images(f"{root}/*/*.jpg"), "key") == ["a/1.jpg", "c/3.jpg"]
    if protocol == "memory":
        filesystem.store.clear()


class TestNames:
    @given(st.binary(max_size=12) | st.text("\\x5ce9", max_size=12).map(str.encode))
    @example(b"caf\xe9")
    @example(b"caf\\xe9")
    @example(b"\\\xe9\\x\xe9")
    def test_escaped_names_are_utf8_and_give_the_name_back(self, raw: bytes) -> None:
        name = raw.decode("utf-8", "surrogateescape")
        escaped(name).encode()
        assert unescaped(escaped(name)) == name

    def test_names_stay_what_they_are_where_they_can(self) -> None:
        for name in ("a.jpg", "ü/é.jpg", "a\\b.jpg", "a\\x.jpg", "a\\xZZ.jpg", "100%E9.jpg"):
            assert escaped(name) == name

    def test_a_dataset_with_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        raw = os.fsencode(tmp_path)
        for folder, name in ((b"caf\xe9", b"1\xff.jpg"), (b"caf\xe9", b"2.jpg"), (b"caf\\xe9", b"3.jpg")):
            os.makedirs(raw + b"/" + folder, exist_ok=True)
            Path(os.fsdecode(raw + b"/" + folder + b"/" + name)).write_bytes(name)
        source = list_images(str(tmp_path))
        assert column(source, "key") == ["caf\\x5cxe9/3.jpg", "caf\\xe9/1\\xff.jpg", "caf\\xe9/2.jpg"]
        assert source.class_names == ("caf\\x5cxe9", "caf\\xe9")
        assert read(source) == [b"3.jpg", b"1\xff.jpg", b"2.jpg"]
        assert pending_index(source.references).schema == INDEX
        Path(os.fsdecode(raw + b"/caf\xe9/2.jpg")).unlink()
        gone = read(source)[2]
        assert isinstance(gone, ImageError)
        str(gone).encode()  # goes into the ledger

    def test_tars_and_parquet_in_such_folders(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from tests.helpers.datasets import tar_info, write_tar

        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
        folder.mkdir()
        write_tar(folder / "x.tar", [(tar_info("a.png"), b"a")])
        assert read(list_images(f"{folder}/*.tar")) == [b"a"]
        (folder / os.fsdecode(b"\xfc.jpg")).write_bytes(b"u")
        images = pa.array([b"\xfc.jpg", os.fsencode(folder) + b"/\xfc.jpg"]).view(pa.string())
        with (folder / "x.parquet").open("wb") as file:
            pq.write_table(pa.table({"path": images}), file)
        source = list_images(f"{folder}/*.parquet")
        assert column(source, "key") == ["\\xfc.jpg", f"{tmp_path}/\\xe9/\\xfc.jpg"]
        assert read(source) == [b"u", b"u"]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("a.heic", True), ("A.CR2", True), ("a.jpg_large", True), ("a.jpg~", True), ("a.jpg.1", True),
            ("a.png (1)", True), ("a.txt", False), ("a.jpg.json", False), ("a.jpgw", False), ("a.npy", False),
        ],
    )  # fmt: skip
    def test_what_looks_like_an_image(self, name: str, expected: bool) -> None:
        assert looks_like_image(name) == expected


def test_what_is_left_out_is_said_and_refused(tmp_path: Path) -> None:
    for name in [*(f"{i}.jpg" for i in range(8)), "x.heic", "y.heic", "notes.txt", "a.json", "b.json", "Makefile"]:
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = list_images(str(tmp_path), limit=2)
    assert source.candidates == 11
    lines = "\n".join(describe_findings(source.findings))
    assert "left out    2 images of an unsupported format (.heic), e.g. x.heic" in lines
    assert "skipped     2 files that are not images (.json), e.g. a.json" in lines
    assert "files that are not images (without a suffix), e.g. Makefile" in lines
    refuse_losses("photos", source.findings, source.candidates, 0.28)
    with pytest.raises(JobError, match=r"3 of 11 images \(27.3%\) cannot be used.*0.27:\n.*heic.*\n.*pipe") as error:
        refuse_losses("photos", source.findings, source.candidates, 0.27)
    assert "--max-failed-share" in str(error.value)


def test_many_reasons_are_summed_up(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"x.s{chr(97 + i)}").write_bytes(b"")
    (tmp_path / "a.jpg").write_bytes(b"")
    lines = describe_findings(list_images(str(tmp_path)).findings)
    assert len(lines) == 7
    assert lines[-1] == "skipped     14 more, for 14 other reasons"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of POSIX")
def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner can enter
        closed = Path(folder, "a", "closed")
        closed.mkdir(parents=True)
        Path(folder, "1.jpg").write_bytes(b"")
        os.chmod(folder, 0o755)
        closed.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            with pytest.raises(JobError, match=f"no permission to read:.*Permission denied: '{closed}'"):
                list_images(folder)
        finally:
            os.seteuid(user)
            closed.chmod(0o755)
