"""read_images: how far it reads ahead, images that are missing, references from another process."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import ImageError
from pipeline.images.listing.source import Source, list_images
from pipeline.images.reading.read import read_images
from schemas.index import REFERENCES
from tests.helpers.datasets import put, read, tar_of
from tests.helpers.photographs import photo

PHOTO = photo(16, 16)


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
