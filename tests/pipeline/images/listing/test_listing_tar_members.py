"""Members of tars: which are images, and where links lead."""

import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images.listing.findings import Tally
from pipeline.images.listing.names import IMAGE_SUFFIXES, suffix_of
from pipeline.images.listing.source import list_images
from pipeline.images.listing.tar_samples import choose_images, split_name
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
        assert "gone.png is a link to nothing.png, not a file in this tar" in str(read(source)[1])
        assert found(source, "row") == {"links to no file in their tar": 6}

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
            "members with an image's name that are not files (a pipe, a device)": 1,
            "images of an unsupported format (.cr2)": 1,
            "images of an unsupported format (.jpg_large)": 1,
        }
        assert found(source, "other") == {
            "links to folders, not entered": 1,
            "hidden members with an image's name": 1,
            "files that are not images (.txt)": 1,
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
        assert found(source, "image") == {"members replaced by a later one of the same name": 1}
        assert found(source, "other") == {"duplicate members, used once": 1}

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
            counted = [f for f in source.findings if f.about in ("image", "other") and "not images" not in f.reason]
            assert len(images) == source.references.num_rows
            assert len(images) + sum(f.count for f in counted) == 1 + sum(map(is_image, names))
            for image in read(source):
                assert is_image(["ok.jpg", *names][int(image)])  # type: ignore[arg-type]
