"""Tars: their formats, sparse members, labels, and how much of a tar is read."""

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from pipeline.errors import ImageError, JobError
from pipeline.images.listing.source import list_images
from pipeline.images.reading.fetch import Fetch
from pipeline.images.reading.tar_members import read_member
from tests.helpers.datasets import by_key, column, found, read, tar_info, write_tar


class TestFormats:
    @pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names_and_names_that_are_not_utf8(self, tmp_path: Path, fmt: int) -> None:
        names = ["n" * 150 + "/" + "m" * 150, "caf\udce9", "caf\\xe9", "ü" * 90]
        path = write_tar(tmp_path / "x.tar", [(tar_info(f"{n}.png"), n[:9].encode("utf-8", "surrogateescape")) for n in names], format=fmt)  # fmt: skip  # noqa: E501
        source = list_images(str(path))
        assert column(source, "key") == [names[0], "caf\\xe9", "caf\\x5cxe9", names[3]]
        assert read(source) == [b"nnnnnnnnn", b"caf\xe9", b"caf\\xe9", ("ü" * 9).encode()]

    def test_archives_one_after_the_other(self, tmp_path: Path) -> None:
        for name in "ab":
            write_tar(tmp_path / f"{name}.tar", [(tar_info(f"{name}.png"), name.encode())])
        both = tmp_path / "both.tar"
        both.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
        assert by_key(list_images(str(both))) == {"a": b"a", "b": b"b"}
        both.write_bytes((tmp_path / "a.tar").read_bytes() + b"x" * 512)
        source = list_images(str(both))
        assert found(source, "other") == {"tars with data after their end that is not another archive": 1}
        both.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()[:600])
        with pytest.raises(JobError, match="truncated or damaged at or after byte"):
            list_images(str(both))

    @pytest.mark.parametrize("options", [["gnu"], ["pax", "0.0"], ["pax", "0.1"], ["pax", "1.0"]], ids="-".join)
    @pytest.mark.parametrize("seed", range(3))
    def test_sparse_members_are_what_is_unpacked(self, tmp_path: Path, options: list[str], seed: int) -> None:
        rng = random.Random(seed)
        members = {}
        for number in range(4):
            size = rng.randrange(1, 40) * 4096 + rng.randrange(4096)
            path = tmp_path / f"{number}.ppm"
            with path.open("wb") as file:
                file.truncate(size)
                for _ in range(rng.randrange(0, 30)):
                    file.seek(rng.randrange(size))
                    file.write(rng.randbytes(min(3000, size - file.tell())))
            members[path.name] = path.read_bytes()
        (tmp_path / "link.ppm").symlink_to("1.ppm")
        version = ["--sparse-version", options[1]] if len(options) == 2 else []
        command = ["tar", "-C", tmp_path, "--format", options[0], "--sparse", "--hole-detection=raw", *version]
        subprocess.run([*command, "-cf", tmp_path / "x.tar", "link.ppm", *members], check=True)
        source = list_images(str(tmp_path / "x.tar"))
        expected = {Path(name).stem: data for name, data in members.items()}
        assert by_key(source) == {"link": members["1.ppm"], **expected}
        with tarfile.open(tmp_path / "x.tar") as tar:
            assert any(member.issparse() for member in tar)
        small = read(source, max_bytes=5000)
        assert [getattr(image, "status", None) for image in small] == ["too_large"] * 5

    def test_a_sparse_map_that_does_not_fit_is_an_error_and_not_the_neighbours_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.ppm"
        with path.open("wb") as file:
            file.write(b"x" * 4096)
            file.seek(1 << 16)
            file.write(b"y" * 4096)
        (tmp_path / "b.ppm").write_bytes(b"secret" * 2000)
        subprocess.run(
            ["tar", "-C", tmp_path, "--format", "gnu", "-S", "--hole-detection=raw", "-cf", tmp_path / "x.tar", "a.ppm", "b.ppm"],  # noqa: E501
            check=True,
        )  # fmt: skip
        source = list_images(str(tmp_path / "x.tar"))
        assert by_key(source)["a"] == path.read_bytes()
        data = bytearray((tmp_path / "x.tar").read_bytes())
        at = data.index(b"00000010000\0", 386)  # length of the first segment: 4096 in octal
        data[at : at + 12] = b"00000040000\0"
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
        (tmp_path / "x.tar").write_bytes(data)
        damaged = read(source)[0]
        assert isinstance(damaged, ImageError)
        assert "does not fit its size" in str(damaged)

    def test_a_member_that_is_gone_is_a_failed_row(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [(tar_info("a.png", tarfile.SYMTYPE, "b"), b"")])
        fetch = Fetch(str(path), 1 << 20, None)
        for data in (b"", bytes(2048), b"x" * 2048):
            path.write_bytes(data)
            outcome = read_member(str(path), 0, fetch)
            assert isinstance(outcome, ImageError)
            assert outcome.status == "unreadable"


class TestLabels:
    def test_cls_members_anywhere_and_by_links(self, tmp_path: Path) -> None:
        path = write_tar(
            tmp_path / "x.tar",
            [
                (tar_info("a.png"), b"a"),
                (tar_info("shot.0001.png"), b"1"),
                (tar_info("shot.0002.png"), b"2"),
                (tar_info("b.png"), b"b"),
                (tar_info("a.cls"), b" 7\n"),
                (tar_info("shot.cls"), b"8"),
                (tar_info("shot.0002.cls"), b"9"),
                (tar_info("b.cls", tarfile.SYMTYPE, "labels/b"), b""),
                (tar_info("labels/b"), b"10"),
                (tar_info("nobody.cls"), b"1"),
            ],
        )
        source = list_images(str(path))
        assert dict(zip(column(source, "key"), column(source, "label"), strict=True)) == {
            "a": 7, "shot.0001": 8, "shot.0002": 9, "b": 10,
        }  # fmt: skip
        assert found(source, "label") == {".cls members without an image": 1}

    def test_texts_are_classes_over_all_tars(self, tmp_path: Path) -> None:
        for tar, labels in (("0", {"a": b"dog", "b": b"cat"}), ("1", {"c": b"ape\n", "d": b"dog", "e": b""})):
            members = [(tar_info(f"{key}.png"), b"") for key in labels]
            write_tar(tmp_path / f"{tar}.tar", members + [(tar_info(f"{k}.cls"), v) for k, v in labels.items()])
        source = list_images(str(tmp_path))
        assert source.class_names == ("ape", "cat", "dog")
        assert column(source, "label") == [2, 1, 0, 2, None]

    def test_a_text_among_numbers_is_told(self, tmp_path: Path) -> None:
        labels = {"a": b"1", "b": b"2", "c": b"oops", "d": b"3.0", "e": b"99999999999999999999"}
        members = [
            (tar_info(f"{key}.{s}"), v if s == "cls" else b"") for key, v in labels.items() for s in ("png", "cls")
        ]
        source = list_images(str(write_tar(tmp_path / "x.tar", members)))
        assert column(source, "label") == [1, 2, None, 3, None]
        assert found(source, "label") == {"labels that are text, where most are numbers": 2}


class TestHowMuchIsRead:
    def bytes_read(self, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> tuple[int, int, int]:
        """Of a remote tar: requests, bytes, and the size of the tar."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number, size in enumerate(sizes):
                info = tar_info(f"{number:04}.jpg")
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
        filesystem = MemoryFileSystem()
        filesystem.pipe_file("/many/x.tar", buffer.getvalue())
        reads: list[int] = []
        original = MemoryFile.read

        def counted(self: MemoryFile, size: int = -1) -> bytes:
            data = original(self, size)
            reads.append(len(data))
            return data

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFile, "read", counted, raising=False)
            assert column(list_images("memory://many/x.tar"), "nbytes") == sizes
        filesystem.store.clear()
        return len(reads), sum(reads), len(buffer.getvalue())

    def test_large_members_are_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        requests, nbytes, size = self.bytes_read(monkeypatch, [1 << 20] * 40)
        assert nbytes < size / 30
        assert requests < 50

    def test_small_members_are_not_a_request_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        requests, nbytes, size = self.bytes_read(monkeypatch, [20_000] * 1000)
        assert requests < 20
        assert nbytes <= 1.1 * size

    def test_of_a_local_tar_hardly_more_than_headers(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [(tar_info(f"{i:04}.jpg"), bytes(150_000)) for i in range(100)])
        list_images(str(path))  # imports what it needs
        before = int(Path("/proc/self/io").read_text().split()[1])
        list_images(str(path))
        assert int(Path("/proc/self/io").read_text().split()[1]) - before < path.stat().st_size / 50

    def test_a_limit_reads_a_little_further_for_labels(self, tmp_path: Path) -> None:
        members = [(tar_info(f"{i:05}.jpg"), b"") for i in range(3000)]
        members[500:500] = [(tar_info("00001.cls"), b"5")]
        path = write_tar(tmp_path / "x.tar", members)
        path.write_bytes(path.read_bytes()[: 2000 * 512])
        assert column(list_images(str(path), limit=3), "label") == [None, 5, None]
        with pytest.raises(JobError, match="truncated"):
            list_images(str(path))
