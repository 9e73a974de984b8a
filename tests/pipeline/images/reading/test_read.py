"""What reading says of an image, and what it does not: local file systems, S3, columns of Parquet files, workers."""

import errno
import io
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from densefeat.errors import StorageUnavailable, WrongClock
from pipeline.errors import ImageError, JobError
from pipeline.images.batches import BatchLoader, WorkStopped
from pipeline.images.decoding.decode import Decoded, Geometry
from pipeline.images.listing.source import Source, list_images
from pipeline.images.reading import ranges as read_bytes
from pipeline.images.reading.bounds import Bounds
from pipeline.images.reading.fetch import Fetch
from pipeline.images.reading.read import read_images
from pipeline.reporting.seconds import StageSeconds
from schemas.index import REFERENCES
from tests.helpers.photographs import photo
from tests.helpers.servers.web import Answer, Request, Web, body, serving, status

PATIENCE_S = 0.8
BOUNDS = Bounds(connect_s=1.0, between_bytes_s=0.6, slack_s=2.0, in_all_s=4.0)


def read(source: Source, **options: object) -> list[bytes | ImageError]:
    return read_rows(source.references, source.kind, **{"image_column": source.image_column, **options})


def read_rows(references: pa.Table, kind: str, **options: object) -> list[bytes | ImageError]:
    options = {"image_column": None, "patience_s": PATIENCE_S, "bounds": BOUNDS, **options}
    with ThreadPoolExecutor(4) as pool:
        return list(read_images(references, kind=kind, pool=pool, **options))


def references(uris: list[str], **columns: list[object]) -> pa.Table:
    nothing = [None] * len(uris)
    places = [columns.get(name, nothing) for name in ("offset", "nbytes")]
    return pa.table([uris, uris, *places, nothing], schema=REFERENCES)


def statuses(outcomes: list[bytes | ImageError]) -> list[str]:
    return [outcome.status if isinstance(outcome, ImageError) else "ok" for outcome in outcomes]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a.jpg, b.jpg, c.jpg."""
    folder = tmp_path / "set" / "photos"
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    return folder


class TestLocal:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], list[int]]:
        """``failing(error, times)``: the first reads of b.jpg raise."""

        def install(error: Exception, times: int) -> list[int]:
            calls: list[int] = []
            original = os.stat

            def stat(path: object, *arguments: object, **options: object) -> os.stat_result:
                if str(path).endswith("b.jpg"):
                    calls.append(1)
                    if len(calls) <= times:
                        raise error
                return original(path, *arguments, **options)

            monkeypatch.setattr(read_bytes.os, "stat", stat)
            return calls

        return install

    @pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EMFILE", "EAGAIN"])
    def test_errors_of_a_file_system_pass_or_are_raised(self, photos: Path, failing, name: str) -> None:
        source = list_images(str(photos))
        error = OSError(getattr(errno, name), "…", str(photos / "b.jpg"))
        calls = failing(error, 2)
        assert read(source, patience_s=5) == [b"a", b"b", b"c"]
        assert len(calls) == 3
        failing(error, 1000)
        with pytest.raises(StorageUnavailable, match=r"b\.jpg did not answer"):
            read(source)

    @pytest.mark.parametrize("name", ["EACCES", "EPERM", "ELOOP", "ENAMETOOLONG", "ENOENT", "EISDIR"])
    def test_errors_of_an_image_are_outcomes_at_once(self, photos: Path, failing, name: str) -> None:
        source = list_images(str(photos))
        number = getattr(errno, name)
        calls = failing(OSError(number, os.strerror(number), str(photos / "b.jpg")), 1000)
        assert statuses(read(source)) == ["ok", "unreadable", "ok"]
        assert len(calls) == 1

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), TypeError("a bug")])
    def test_errors_of_the_process_are_raised(self, photos: Path, failing, error: Exception) -> None:
        source = list_images(str(photos))
        failing(error, 1000)
        with pytest.raises(type(error)):
            read(source)

    def test_missing(self, photos: Path) -> None:
        source = list_images(str(photos))
        (photos / "b.jpg").unlink()
        assert statuses(read(source)) == ["ok", "unreadable", "ok"]

    def test_the_folder_is_gone(self, photos: Path) -> None:
        source = list_images(str(photos))
        photos.rename(photos.with_name("elsewhere"))
        with pytest.raises(StorageUnavailable, match=r"photos/a\.jpg.*folder .*/photos is gone or empty"):
            read(source)
        photos.mkdir()  # as a mount point is when nothing is mounted
        with pytest.raises(StorageUnavailable, match="gone or empty"):
            read(source)
        shutil.rmtree(photos.parent)
        photos.parent.write_bytes(b"a file now")
        with pytest.raises(StorageUnavailable, match="gone or empty"):
            read(source)

    def test_the_folder_comes_back(self, photos: Path) -> None:
        source = list_images(str(photos))
        elsewhere = photos.rename(photos.with_name("elsewhere"))
        with ThreadPoolExecutor(2) as pool:
            outcomes = read_images(source.references, image_column=None, kind="folder", pool=pool, patience_s=20)
            later = ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.7), elsewhere.rename(photos)))
            assert list(outcomes) == [b"a", b"b", b"c"]
            later.result()

    def test_what_is_no_file(self, photos: Path) -> None:
        os.mkfifo(photos / "pipe.jpg")  # reading it would wait for ever
        (photos / "folder.jpg").mkdir()
        uris = [str(photos / "pipe.jpg"), str(photos / "folder.jpg"), "/dev/zero", str(photos / "a.jpg")]
        assert statuses(read_rows(references(uris), "folder")) == ["unreadable"] * 3 + ["ok"]

    def test_a_tar_that_is_shorter_than_it_was(self, tmp_path: Path) -> None:
        (tmp_path / "x.tar").write_bytes(bytes(range(100)))
        rows = references([str(tmp_path / "x.tar")] * 3, offset=[0, 90, 200], nbytes=[10, 20, 10])
        outcomes = read_rows(rows, "tar")
        assert outcomes[0] == bytes(range(10))
        assert statuses(outcomes[1:]) == ["unreadable", "unreadable"]
        assert "got 10 of the 20 bytes" in str(outcomes[1])

    def test_bounds_of_size(self, tmp_path: Path) -> None:
        (tmp_path / "1.jpg").write_bytes(b"x" * 100)
        rows = references([str(tmp_path / "1.jpg")])
        assert read_rows(rows, "folder", max_bytes=100) == [b"x" * 100]
        assert statuses(read_rows(rows, "folder", max_bytes=99)) == ["too_large"]


class TestParquet:
    CELLS = tuple(bytes([i]) * 50_000 for i in range(40))

    @pytest.fixture
    def web(self) -> Iterator[Web]:
        with serving() as web:
            file = io.BytesIO()
            pq.write_table(pa.table({"image": self.CELLS}), file, row_group_size=4, compression="none")
            web.answers["/x.parquet"] = body(file.getvalue())
            yield web

    def rows(self, web: Web) -> pa.Table:
        return references([f"{web.url}/x.parquet"] * 40, offset=list(range(40)))

    def test_cells(self, web: Web) -> None:
        assert read_rows(self.rows(web), "parquet", image_column="image") == list(self.CELLS)

    @pytest.mark.parametrize("fault", ["503", "cut", "reset"])
    def test_faults_that_pass_cost_nothing(self, web: Web, fault: str) -> None:
        sound = web.answers["/x.parquet"]

        def faulty(request: Request) -> None:
            web.asked["ranges"] += request.command == "GET"
            if request.command == "HEAD" or web.asked["ranges"] % 2:
                sound(request)
            elif fault == "503":
                status(503)(request)
            else:
                if fault == "cut":
                    content_range = request.headers["Range"].replace("=", " ") + "/9999999"
                    request.begin(206, Content_Length=1 << 20, Content_Range=content_range)
                    request.write(b"short")
                request.close_connection = True

        web.answers["/x.parquet"] = faulty
        assert read_rows(self.rows(web), "parquet", image_column="image", patience_s=10) == list(self.CELLS)
        assert web.asked["ranges"] > 1

    def test_faults_that_last_are_never_outcomes(self, web: Web) -> None:
        web.answers["/x.parquet"] = status(503)
        with pytest.raises(StorageUnavailable, match=r"x\.parquet did not answer"):
            read_rows(self.rows(web), "parquet", image_column="image")

    def test_a_file_that_is_missing_or_damaged(self, web: Web, tmp_path: Path) -> None:
        del web.answers["/x.parquet"]
        assert set(statuses(read_rows(self.rows(web), "parquet", image_column="image"))) == {"unreadable"}
        for data in (b"PAR1 and no more", b""):
            (tmp_path / "x.parquet").write_bytes(data)
            rows = references([str(tmp_path / "x.parquet")] * 2, offset=[0, 1])
            assert statuses(read_rows(rows, "parquet", image_column="image")) == ["unreadable"] * 2


def silent(request: Request) -> None:
    request.web.closing.wait(20)
    request.close_connection = True


def s3_error(code: str, number: int) -> Answer:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>…</Message></Error>".encode()

    def answer(request: Request) -> None:
        request.begin(number, Content_Type="application/xml", Content_Length=len(text))
        request.write(text)

    return answer


# Without botocore's own tries, so that tests take seconds.
S3_OPTIONS = {
    "key": "a", "secret": "b", "client_kwargs": {"region_name": "us-east-1"},
    "config_kwargs": {"retries": {"max_attempts": 0}, "s3": {"addressing_style": "path"}},
}  # fmt: skip


class TestS3:
    def read_one(self, answer: Answer, faults: tuple[Answer, ...] = (), **options: object) -> bytes | ImageError:
        pytest.importorskip("s3fs")
        with serving() as web:
            web.answers["/b/1.jpg"], web.faults["/b/1.jpg"] = answer, list(faults)
            storage_options = {**S3_OPTIONS, "endpoint_url": web.url}
            options = {"bounds": Bounds(), "storage_options": storage_options, **options}
            (outcome,) = read_rows(references(["s3://b/1.jpg"]), "folder", **options)
            return outcome

    def test_bytes(self) -> None:
        for data in (b"one", b""):
            assert self.read_one(body(data)) == data
        assert statuses([self.read_one(body(b"x" * 100), max_bytes=99)]) == ["too_large"]

    @pytest.mark.parametrize(
        ("code", "number"), [("SlowDown", 503), ("InternalError", 500), ("RequestTimeout", 400), ("Unknown", 502)]
    )
    def test_faults_that_pass(self, code: str, number: int) -> None:
        fault = s3_error(code, number)
        assert self.read_one(body(b"one"), (fault, fault), patience_s=20) == b"one"
        with pytest.raises(StorageUnavailable, match=r"s3://b/1\.jpg did not answer"):
            self.read_one(fault)

    def test_a_server_that_is_silent_or_gone(self) -> None:
        with pytest.raises(StorageUnavailable):
            self.read_one(silent, bounds=BOUNDS)
        with serving() as web:
            options = {**S3_OPTIONS, "endpoint_url": web.url}
        with pytest.raises(StorageUnavailable):
            read_rows(references(["s3://b/1.jpg"]), "folder", storage_options=options)

    @pytest.mark.parametrize(
        ("code", "number"),
        [("NoSuchKey", 404), ("AccessDenied", 403), ("InvalidObjectState", 403), ("KMS.DisabledException", 400)],
    )
    def test_what_is_true_of_the_image(self, code: str, number: int) -> None:
        assert statuses([self.read_one(s3_error(code, number))]) == ["unreadable"]

    @pytest.mark.parametrize(
        ("code", "number"), [("ExpiredToken", 400), ("InvalidAccessKeyId", 403), ("SignatureDoesNotMatch", 403)]
    )
    def test_credentials_are_not_true_of_the_image(self, code: str, number: int) -> None:
        with pytest.raises(JobError, match=r"s3://b/1\.jpg: no credentials, or they were refused.*AWS_ACCESS_KEY_ID"):
            self.read_one(s3_error(code, number))

    def test_a_wrong_clock_is_not_true_of_the_image(self) -> None:
        with pytest.raises(WrongClock, match=r"s3://b/1\.jpg: the clock of .*: set the clock"):
            self.read_one(s3_error("RequestTimeTooSkewed", 403))

    def test_credentials_that_are_renewed(self) -> None:
        assert self.read_one(body(b"one"), (s3_error("ExpiredToken", 400),), patience_s=10) == b"one"

    def test_no_credentials(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        s3fs = pytest.importorskip("s3fs")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(JobError, match="no credentials"):
            read_rows(references(["s3://b/1.jpg"]), "folder")


class TestWorker:
    @staticmethod
    def loader() -> BatchLoader:
        geometry = Geometry((16, 16), "squash", (16, 16))
        return BatchLoader(
            geometry, 2, source_kind="folder", image_column=None, max_pixels=10**6, min_side=1, threads=2
        )

    def test_a_batch_is_whole_or_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(read_images.__kwdefaults__, "patience_s", PATIENCE_S)
        with serving() as web:
            web.answers = {f"/{i}.jpg": body(photo(32, 32)) for i in range(3)} | {"/3.jpg": status(503)}
            rows = references([f"{web.url}/{i}.jpg" for i in range(4)])
            loaded = []
            with pytest.raises(StorageUnavailable, match=r"3\.jpg"):
                loaded.extend(self.loader().batches(rows, StageSeconds()))
            assert all(isinstance(image, Decoded) for batch in loaded for image in batch.decoded)

    def test_it_can_be_stopped(self) -> None:
        with serving() as web:
            web.answers["/0.jpg"] = status(503)
            loader = self.loader()
            batches = loader.batches(references([f"{web.url}/0.jpg"]), StageSeconds())
            later = ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.3), loader.stop.set()))
            begun = time.monotonic()
            with pytest.raises(WorkStopped):
                next(batches)
            assert time.monotonic() - begun < 3
            later.result()

    def test_the_error_crosses_processes_whole(self) -> None:
        with pytest.raises(StorageUnavailable) as raised:
            Fetch("http://127.0.0.1:9", 99, None, patience_s=0, bounds=BOUNDS)("http://127.0.0.1:9/1.jpg")
        again = pickle.loads(pickle.dumps(raised.value))
        assert type(again) is StorageUnavailable
        assert str(again) == str(raised.value)
        assert "http://127.0.0.1:9/1.jpg" in str(again)
