"""Reading from servers that fail, lie, or never end."""

import gzip
import resource
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet
import pytest

from densefeat.errors import StorageUnavailable
from pipeline.errors import ImageError, JobError
from pipeline.images.reading import fetch as read_fetch
from pipeline.images.reading.bounds import Bounds
from pipeline.images.reading.hosts import Hosts
from pipeline.images.reading.read import read_images
from schemas.index import REFERENCES
from tests.helpers.web import Answer, Request, Web, body, serving, status

BOUNDS = Bounds(connect_s=1.0, between_bytes_s=0.6, slack_s=1.2, bytes_per_s=100e6, in_all_s=3.0)
PATIENCE_S = 0.8


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as web:
        yield web


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_fetch, "HOSTS", Hosts())


def references(uris: list[str], offsets: list[int] | None = None, sizes: list[int] | None = None) -> pa.Table:
    nothing = [None] * len(uris)
    return pa.table([uris, uris, offsets or nothing, sizes or nothing, nothing], schema=REFERENCES)


def read(table: pa.Table, kind: str = "folder", **options: object) -> list[bytes | ImageError]:
    options = {"patience_s": PATIENCE_S, "bounds": BOUNDS, "image_column": "image", **options}
    with ThreadPoolExecutor(8) as pool:
        return list(read_images(table, kind=kind, pool=pool, **options))


def read_one(web: Web, answer: Answer, **options: object) -> bytes | ImageError:
    web.answers["/1.jpg"] = answer
    (outcome,) = read(references([f"{web.url}/1.jpg"]), **options)
    return outcome


def silent(request: Request) -> None:
    request.web.closing.wait(20)
    request.close_connection = True


def silent_after_its_head(request: Request) -> None:
    request.begin(200, Content_Length=100)
    silent(request)


def dripping(request: Request) -> None:
    request.begin(200, Content_Length=100_000)
    while not request.web.closing.wait(0.1):
        request.write(b".")


def cut(request: Request) -> None:
    request.begin(200, Content_Length=1000)
    request.write(b"short")
    request.close_connection = True


def cut_chunk(request: Request) -> None:
    request.begin(200, Transfer_Encoding="chunked")
    request.write(b"10\r\nshort")
    request.close_connection = True


def reset(request: Request) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)
    request.close_connection = True


def no_http(request: Request) -> None:
    request.wfile.write(b"220 mail.example ESMTP\r\n\r\n")
    request.close_connection = True


def endless(request: Request) -> None:
    request.begin(200, Transfer_Encoding="chunked")
    while not request.web.closing.is_set():
        request.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


def redirect(to: str) -> Answer:
    return status(302, Location=to)


def bomb() -> bytes:
    """256 MB, as 1 MB."""
    compressor = zlib.compressobj(1, wbits=31)
    megabyte = bytes(1 << 20)
    return b"".join(compressor.compress(megabyte) for _ in range(256)) + compressor.flush()


class TestPassing:
    @pytest.mark.parametrize(
        "faults",
        [
            [status(503), status(503)],
            [cut, cut_chunk],
            [reset],
            [status(429, Retry_After=0), status(500), status(408)],
            [silent],
            [silent_after_its_head],
            [dripping],
            [no_http],
        ],
        ids=["503", "cut", "reset", "429", "silent", "silent after its head", "dripping", "no HTTP"],
    )
    def test_faults_that_pass_cost_nothing(self, web: Web, faults: list[Answer]) -> None:
        web.faults["/1.jpg"] = list(faults)
        assert read_one(web, body(b"one"), patience_s=5) == b"one"
        assert web.asked["/1.jpg"] == len(faults) + 1

    @pytest.mark.parametrize(
        "answer",
        [status(503), status(429), cut, cut_chunk, reset, silent, silent_after_its_head, dripping, no_http],
    )
    def test_faults_that_last_are_never_outcomes(self, web: Web, answer: Answer) -> None:
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable, match=f"{web.url}/1.jpg did not answer"):
            read_one(web, answer)
        assert time.monotonic() - begun < 5
        assert web.asked["/1.jpg"] > 1

    def test_images_before_are_given(self, web: Web) -> None:
        web.answers = {"/1.jpg": body(b"one"), "/2.jpg": status(503), "/3.jpg": body(b"three")}
        table = references([f"{web.url}/{i}.jpg" for i in (1, 2, 3)])
        with ThreadPoolExecutor(2) as pool:
            outcomes = read_images(table, image_column=None, kind="folder", pool=pool, patience_s=0.5)
            assert next(outcomes) == b"one"
            with pytest.raises(StorageUnavailable, match=r"2\.jpg"):
                next(outcomes)

    def test_a_server_that_is_down_costs_one_patience(self, web: Web) -> None:
        web.answers = {f"/{i}.jpg": status(503) for i in range(64)}
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable):
            read(references([f"{web.url}/{i}.jpg" for i in range(64)]), patience_s=1)
        assert time.monotonic() - begun < 5


class TestLasting:
    @pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451])
    def test_what_is_true_of_the_image_is_asked_once(self, web: Web, code: int) -> None:
        outcome = read_one(web, status(code))
        assert isinstance(outcome, ImageError)
        assert outcome.status == "unreadable"
        assert web.asked["/1.jpg"] == 1

    def test_redirects(self, web: Web) -> None:
        web.answers["/2.jpg"] = body(b"two")
        assert read_one(web, redirect("/2.jpg")) == b"two"
        outcome = read_one(web, redirect("/1.jpg"))
        assert isinstance(outcome, ImageError)
        assert "TooManyRedirects" in str(outcome)


class TestSize:
    def test_a_body_without_an_end(self, web: Web) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = read_one(web, endless, max_bytes=8 << 20)
        assert isinstance(outcome, ImageError)
        assert outcome.status == "too_large"
        assert web.asked["/1.jpg"] == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB

    def test_a_body_that_says_how_long_it_is_is_not_read(self, web: Web) -> None:
        def long(request: Request) -> None:
            request.begin(200, Content_Length=1 << 40)
            silent(request)

        outcome = read_one(web, long)
        assert isinstance(outcome, ImageError)
        assert outcome.status == "too_large"
        assert str(1 << 40) in str(outcome)

    @pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
    def test_a_compressed_body_is_decompressed(self, web: Web, encoding: str) -> None:
        data = bytes(range(256)) * 1000
        assert read_one(web, body(gzip.compress(data), Content_Encoding=encoding)) == data
        assert read_one(web, body(zlib.compress(data), Content_Encoding="deflate"), max_bytes=len(data)) == data
        outcome = read_one(web, body(gzip.compress(data), Content_Encoding=encoding), max_bytes=len(data) - 1)
        assert isinstance(outcome, ImageError)
        assert outcome.status == "too_large"

    def test_a_bomb(self, web: Web) -> None:
        data, before = bomb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = read_one(web, body(data, Content_Encoding="gzip"), max_bytes=8 << 20)
        assert isinstance(outcome, ImageError)
        assert outcome.status == "too_large"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB

    @pytest.mark.parametrize(
        ("data", "encoding"), [(b"no gzip", "gzip"), (gzip.compress(b"x" * 99, mtime=0)[:-9], "gzip"), (b"x", "br")]
    )
    def test_an_encoding_that_cannot_be_undone(self, web: Web, data: bytes, encoding: str) -> None:
        outcome = read_one(web, body(data, Content_Encoding=encoding))
        assert isinstance(outcome, ImageError)
        assert "encod" in str(outcome)

    @pytest.mark.parametrize("size", [0, 1, 99, 100])
    def test_exact_bounds(self, web: Web, size: int) -> None:
        data = b"x" * size
        assert read_one(web, body(data), max_bytes=100) == data

        def chunked(request: Request) -> None:
            request.begin(200, Transfer_Encoding="chunked")
            request.write((b"%x\r\n%s\r\n" % (size, data) if size else b"") + b"0\r\n\r\n")

        assert read_one(web, chunked, max_bytes=100) == data

    def test_a_length_that_is_too_short(self, web: Web) -> None:
        def lying(request: Request) -> None:
            request.begin(200, Content_Length=3)
            request.write(b"one")
            time.sleep(0.3)  # else the rest may come with the answer's head, and what then happens is chance
            request.write(b"twothree")

        for _ in range(3):  # what is left on the connection belongs to no other answer
            assert read_one(web, lying) == b"one"


class TestRanges:
    DATA = bytes(range(256)) * 4

    def read_ranges(self, web: Web, ranges: list[tuple[int, int]]) -> list[bytes | ImageError]:
        offsets, sizes = ([place[i] for place in ranges] for i in (0, 1))
        return read(references([f"{web.url}/x.tar"] * len(ranges), offsets, sizes), "tar")

    def test_members(self, web: Web) -> None:
        web.answers["/x.tar"] = body(self.DATA)
        assert self.read_ranges(web, [(0, 5), (512, 100), (1000, 24)]) == [
            self.DATA[0:5], self.DATA[512:612], self.DATA[1000:],
        ]  # fmt: skip

    def test_a_range_that_is_cut_short_without_an_error(self, web: Web) -> None:
        def short(request: Request) -> None:
            if request.command == "HEAD":
                body(self.DATA)(request)
                return
            request.begin(206, Content_Length=10, Content_Range="bytes 512-521/1024")
            request.write(self.DATA[512:522])

        web.answers["/x.tar"] = body(self.DATA)
        web.faults["/x.tar"] = [short, short]
        assert self.read_ranges(web, [(512, 100)]) == [self.DATA[512:612]]
        web.answers["/x.tar"] = short
        with pytest.raises(StorageUnavailable, match="got 10 of 100 bytes"):
            self.read_ranges(web, [(512, 100)])

    def test_a_tar_that_is_shorter_than_it_was(self, web: Web) -> None:
        web.answers["/x.tar"] = body(self.DATA[:600])
        good, cut_off, gone = self.read_ranges(web, [(0, 5), (512, 100), (1000, 24)])
        assert good == self.DATA[:5]
        assert isinstance(cut_off, ImageError)
        assert "has changed or is cut off: got 88 of the 100 bytes" in str(cut_off)
        assert isinstance(gone, ImageError)

    def test_a_server_without_ranges_is_not_a_bad_image(self, web: Web) -> None:
        web.answers["/x.tar"] = body(self.DATA, ranges=False)
        assert self.read_ranges(web, [(0, 5)]) == [self.DATA[:5]]
        with pytest.raises(StorageUnavailable, match="does not read ranges"):
            self.read_ranges(web, [(512, 100)])

    def test_another_range_than_asked_for(self, web: Web) -> None:
        def wrong(request: Request) -> None:
            request.begin(206, Content_Length=100, Content_Range="bytes 0-99/1024")
            request.write(self.DATA[:100])

        web.answers["/x.tar"] = wrong
        with pytest.raises(StorageUnavailable, match="asked for the bytes from 512 on, got those from 0 on"):
            self.read_ranges(web, [(512, 100)])


class TestStopping:
    @pytest.mark.parametrize("answer", [silent, status(503)])
    def test_closing_ends_every_wait(self, web: Web, answer: Answer) -> None:
        web.answers = {"/0.jpg": body(b"0"), **{f"/{i}.jpg": answer for i in range(1, 40)}}
        table = references([f"{web.url}/{i}.jpg" for i in range(40)])
        begun = time.monotonic()
        with ThreadPoolExecutor(4) as pool:  # waits for its threads at the end
            outcomes = read_images(table, image_column=None, kind="folder", pool=pool)
            assert next(outcomes) == b"0"
            time.sleep(0.2)
            outcomes.close()
        assert time.monotonic() - begun < 3

    @pytest.mark.parametrize("answer", [silent, status(503)])
    def test_stopping_from_outside(self, web: Web, answer: Answer) -> None:
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        begun = time.monotonic()
        with pytest.raises(StorageUnavailable, match="stopped"):
            read_one(web, answer, stop=stop, bounds=None, patience_s=60)
        assert time.monotonic() - begun < 3


class TestColumnOfUrls:
    """Hosts that are gone, told from a network that is down."""

    @staticmethod
    def read(tmp_path, urls: list[str], **options: object) -> list[bytes | ImageError]:
        pa.parquet.write_table(pa.table({"image": urls}), tmp_path / "u.parquet")
        uris = [str(tmp_path / "u.parquet")] * len(urls)
        return read(references(uris, list(range(len(urls)))), "parquet", **options)

    @staticmethod
    def closed_port() -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{free.getsockname()[1]}"

    def test_a_host_that_is_gone_fails_its_rows(self, web: Web, tmp_path) -> None:
        web.answers["/1.jpg"] = body(b"one")
        gone = self.closed_port()
        one, first, second = self.read(tmp_path, [f"{web.url}/1.jpg", f"{gone}/1.jpg", f"{gone}/2.jpg"])
        assert one == b"one"
        for outcome in (first, second):
            assert isinstance(outcome, ImageError)
            assert "ClientConnectorError" in str(outcome)
        begun = time.monotonic()
        again = self.read(tmp_path, [f"{gone}/3.jpg"], patience_s=60)  # known to be gone: not waited for
        assert isinstance(again[0], ImageError)
        assert time.monotonic() - begun < 3

    def test_a_network_that_is_down_fails_nothing(self, tmp_path) -> None:
        with serving() as web:
            web.answers["/1.jpg"] = body(b"one")
            assert self.read(tmp_path, [f"{web.url}/1.jpg"]) == [b"one"]
        for urls in ([f"{self.closed_port()}/1.jpg"], [f"{web.url}/1.jpg", f"{self.closed_port()}/1.jpg"]):
            with pytest.raises(StorageUnavailable):
                self.read(tmp_path, urls)

    def test_a_host_that_answers_badly_is_not_gone(self, web: Web, tmp_path) -> None:
        web.answers["/1.jpg"] = body(b"one")
        with serving() as other:
            other.answers["/2.jpg"] = status(503)
            with pytest.raises(StorageUnavailable, match=r"2\.jpg"):
                self.read(tmp_path, [f"{web.url}/1.jpg", f"{other.url}/2.jpg"])

    def test_a_name_that_nobody_knows(self, web: Web, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        known = socket.getaddrinfo

        def getaddrinfo(host: object, *arguments: object, **options: object) -> object:
            if host == "gone.example":
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return known(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with pytest.raises(StorageUnavailable, match=r"gone\.example"):  # no other host has answered: who knows
            self.read(tmp_path, ["http://gone.example/1.jpg"])
        web.answers["/1.jpg"] = status(404)  # an answer, too
        begun = time.monotonic()
        missing, gone = self.read(tmp_path, [f"{web.url}/1.jpg", "http://gone.example/1.jpg"], patience_s=60)
        assert isinstance(missing, ImageError)
        assert isinstance(gone, ImageError)
        assert time.monotonic() - begun < 5

    def test_nonsense(self, web: Web, tmp_path) -> None:
        urls = ["http://", "http://[::1", "nonsense://x/1.jpg", "http://127.0.0.1:99999/1.jpg", "/gone/1.jpg"]
        outcomes = self.read(tmp_path, urls)
        assert [getattr(outcome, "status", None) for outcome in outcomes] == ["unreadable"] * len(urls)

    def test_a_missing_package(self, tmp_path) -> None:
        pytest.importorskip("fsspec")
        with pytest.raises(JobError, match=r"densefeat\[gcs\]"):
            self.read(tmp_path, ["gs://bucket/1.jpg"])
