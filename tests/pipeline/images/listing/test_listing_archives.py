"""Tars and Parquet files as references and back to bytes: local and remote, whole and broken."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import ImageError, JobError
from pipeline.images.listing.source import Source, list_images
from tests.helpers.datasets import column, put, read, tar_of


def parquet_of(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


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
