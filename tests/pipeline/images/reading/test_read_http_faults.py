"""Web servers that fail for a while, or for good: waiting, stopping, and hosts that are gone."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet
import pytest

from densefeat.errors import StorageUnavailable
from pipeline.errors import ImageError, JobError
from pipeline.images.reading.read import read_images
from tests.helpers.servers.web import (
    Answer,
    Web,
    body,
    cut,
    cut_chunk,
    dripping,
    no_http,
    read,
    read_one,
    references,
    reset,
    serving,
    silent,
    silent_after_its_head,
    status,
)

pytestmark = pytest.mark.usefixtures("unknown_hosts")


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
