"""Tars: which members are images, what links lead to, sparse members, and how much is read of them."""

import io
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ImageError, JobError
from pipeline.images.listing.findings import Tally
from pipeline.images.listing.names import IMAGE_SUFFIXES, suffix_of
from pipeline.images.listing.source import list_images
from pipeline.images.listing.tar_samples import choose_images, split_name
from pipeline.images.reading.fetch import Fetch
from pipeline.images.reading.tar_members import read_member
from tests.helpers.datasets import by_key, column, found, read, tar_info, write_tar

PARTS = st.sampled_from(["a", "b", "shot", "0000", "0001", "5x", "left", "right", "seg", "v1", "Ä", "2024-01", ""])
SUFFIXES = st.sampled_from(["jpg", "JPG", "png", "tiff", "webp", "cls", "json", "txt"])
NAMES = st.builds(
    lambda folder, parts, suffix: folder + ".".join([*parts, suffix]),
    st.sampled_from(["", "x/", "x/y.z/"]),
    st.lists(PARTS, min_size=1, max_size=4).filter(lambda parts: parts[0] != ""),
    SUFFIXES,
)


def is_image(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES


class TestNames:
    @pytest.mark.parametrize(
        ("name", "stem", "extension"),
        [
            ("a.jpg", "a", "jpg"),
            ("x.1/a.seg.png", "x.1/a", "seg.png"),
            ("shot.0001.png", "shot.0001", "png"),
            ("DJI_0.5x.png", "DJI_0.5x", "png"),
            ("shot.0001.left.png", "shot.0001", "left.png"),
            ("2024.01.05-sea.jpg", "2024.01.05-sea", "jpg"),
            ("a.7z", "a", "7z"),
            ("README", "README", ""),
        ],
    )
    def test_split(self, name: str, stem: str, extension: str) -> None:
        assert split_name(name) == (stem, extension)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(NAMES, unique=True, max_size=12), st.sampled_from([None, "jpg", "png", "left.png"]))
    def test_every_image_is_chosen_or_counted(self, names: list[str], asked: str | None) -> None:
        tally = Tally()
        chosen = choose_images(names, asked, tally)
        places = [image.place for image in chosen]
        assert places == sorted(set(places))
        assert len(places) + sum(f.count for f in tally.findings()) == sum(map(is_image, names))
        for key, place in chosen:
            assert names[place].startswith(f"{key}.")
            assert is_image(names[place])
        if asked is None:  # a key names one image
            assert len({key for key, _ in chosen}) == len(chosen)

    @pytest.mark.parametrize(
        ("names", "keys", "counted"),
        [
            (["shot.0000.png", "shot.0001.png"], ["shot.0000", "shot.0001"], {}),
            (["shot.json", "shot.0000.png", "shot.0001.png"], ["shot.0000", "shot.0001"], {}),
            (["St.Peter.jpg", "St.Paul.jpg", "Mr.T.jpg"], ["St.Peter", "St.Paul", "Mr.T"], {}),
            (["a.png", "a.seg.png", "a.jpg", "a.cls"], ["a"], {"other": 2}),
            (["a.left.png", "a.json"], ["a"], {}),
            (["a.left.png", "a.right.png", "a.json"], ["a"], {"image": 1}),
            (["a.left.png", "a.right.png"], ["a.left", "a.right"], {}),
            (["x/a.jpg", "y/a.jpg"], ["x/a", "y/a"], {}),
        ],
    )
    def test_samples(self, names: list[str], keys: list[str], counted: dict[str, int]) -> None:
        tally = Tally()
        assert [image.key for image in choose_images(names, None, tally)] == keys
        assert {finding.about: finding.count for finding in tally.findings()} == counted

    def test_the_extension_asked_for(self) -> None:
        names = ["a.left.png", "a.right.png", "a.json", "b.0001.right.png", "c.png", "d.0001.png"]
        choose = [(asked, choose_images(names, asked, Tally())) for asked in ("right.png", "png", "0001.right.png")]
        keys = {asked: [image.key for image in chosen] for asked, chosen in choose}
        assert keys == {"right.png": ["a", "b.0001"], "png": ["b.0001.right", "c", "d.0001"], "0001.right.png": ["b"]}


class TestLinks:
    def tar(self, tmp_path: Path, *members: tuple[str, str | bytes, bytes]) -> Path:
        """Members as (name, data or target, type)."""
        rows = []
        for name, content, kind in members:
            target, data = (content, b"") if isinstance(content, str) else ("", content)
            rows.append((tar_info(name, kind, target), data))
        return write_tar(tmp_path / "x.tar", rows)

    def test_links_lead_to_what_unpacking_gives(self, tmp_path: Path) -> None:
        file, link, symlink, folder = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE
        path = self.tar(
            tmp_path,
            ("before.png", "x/a.png", symlink),
            ("./x", b"", folder),
            ("./x/a.png", b"A", file),
            ("hard.png", "./x/a.png", link),
            ("hard_to_hard.png", "hard.png", link),
            ("x/up.png", "../b.png", symlink),
            ("x/up_up.png", "up.png", symlink),
            ("b.png", b"BB", file),
            ("blob", b"CCC", file),
            ("of_blob.png", "blob", symlink),
            ("dir", "x", symlink),
            ("through.png", "dir/up.png", symlink),
            ("absolute.png", "/x/a.png", symlink),
        )
        assert by_key(list_images(str(path))) == {
            "before": b"A", "./x/a": b"A", "hard": b"A", "hard_to_hard": b"A", "x/up": b"BB", "x/up_up": b"BB",
            "b": b"BB", "of_blob": b"CCC", "through": b"BB", "absolute": b"A",
        }  # fmt: skip
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "out", filter="fully_trusted")
        for key, data in by_key(list_images(str(path))).items():
            if key != "absolute":
                assert (tmp_path / "out" / f"{key}.png").read_bytes() == data

    def test_links_to_no_file_are_failed_rows(self, tmp_path: Path) -> None:
        symlink = tarfile.SYMTYPE
        path = self.tar(
            tmp_path,
            ("ok.png", b"ok", tarfile.REGTYPE),
            ("gone.png", "nothing.png", symlink),
            ("self.png", "self.png", symlink),
            ("one.png", "two.png", symlink),
            ("two.png", "one.png", symlink),
            ("out.png", "../../etc/passwd", symlink),
            ("hard.png", "nothing", tarfile.LNKTYPE),
        )
        source = list_images(str(path))
        keys = ["gone", "self", "one", "two", "out", "hard"]
        assert by_key(source) == {"ok": b"ok", **dict.fromkeys(keys, "unreadable")}
        assert "gone.png is a link to nothing.png: no file in this tar" in str(read(source)[1])
        assert found(source, "row") == {"links that lead to no file in their tar": 6}

    def test_what_is_no_file_is_counted(self, tmp_path: Path) -> None:
        path = self.tar(
            tmp_path,
            ("ok.png", b"ok", tarfile.REGTYPE),
            ("pipe.png", b"", tarfile.FIFOTYPE),
            ("folder.png", b"", tarfile.DIRTYPE),
            ("to_folder.png", "folder.png", tarfile.SYMTYPE),
            ("unknown.png", b"as POSIX says", b"Z"),
            ("._ok.png", b"mac", tarfile.REGTYPE),
            ("raw.CR2", b"", tarfile.REGTYPE),
            ("saved.jpg_large", b"", tarfile.REGTYPE),
            ("notes.txt", b"", tarfile.REGTYPE),
        )
        source = list_images(str(path))
        assert by_key(source) == {"ok": b"ok", "unknown": b"as POSIX says"}
        assert found(source, "image") == {
            "members with an image's name that are no files (a pipe, a device)": 1,
            "images of a format that is not read (.cr2)": 1,
            "images of a format that is not read (.jpg_large)": 1,
        }
        assert found(source, "other") == {
            "links to folders, not entered": 1,
            "hidden members with an image's name": 1,
            "files that are no images (.txt)": 1,
        }
        assert source.candidates == 5

    def test_the_last_of_several_with_one_name_counts(self, tmp_path: Path) -> None:
        file = tarfile.REGTYPE
        path = self.tar(
            tmp_path,
            ("a.png", b"old", file),
            ("b.png", b"b", file),
            ("./a.png", b"new", file),
            ("b.png", "b.png", b"1"),
        )
        source = list_images(str(path))
        assert by_key(source) == {"./a": b"new", "b": b"b"}
        assert found(source, "image") == {"members that a later one of the same name replaces": 1}
        assert found(source, "other") == {"members that are there twice, used once": 1}

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.builds(lambda hidden, name: hidden + name, st.sampled_from(["", "", "./", "._"]), NAMES), max_size=9
        )
    )
    def test_every_image_of_a_tar_is_a_row_or_counted(self, names: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            members = [(tar_info(name), str(number).encode()) for number, name in enumerate(["ok.jpg", *names])]
            source = list_images(str(write_tar(Path(folder, "x.tar"), members)))
            images = dict.fromkeys(column(source, "key"))
            counted = [f for f in source.findings if f.about in ("image", "other") and "no images" not in f.reason]
            assert len(images) == source.references.num_rows
            assert len(images) + sum(f.count for f in counted) == 1 + sum(map(is_image, names))
            for image in read(source):
                assert is_image(["ok.jpg", *names][int(image)])  # type: ignore[arg-type]


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
        assert found(source, "other") == {"tars with data after their end that is no further archive": 1}
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
        assert found(source, "label") == {".cls members of no image": 1}

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
