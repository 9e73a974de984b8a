"""Answers of web servers that are read once: errors that last, sizes, encodings, ranges."""

import gzip
import resource
import time
import zlib

import pytest

from densefeat.errors import StorageUnavailable
from pipeline.errors import ImageError
from tests.helpers.servers.web import (
    Request,
    Web,
    body,
    endless,
    read,
    read_one,
    redirect,
    references,
    silent,
    status,
)

pytestmark = pytest.mark.usefixtures("unknown_hosts")


def bomb() -> bytes:
    """256 MB, as 1 MB."""
    compressor = zlib.compressobj(1, wbits=31)
    megabyte = bytes(1 << 20)
    return b"".join(compressor.compress(megabyte) for _ in range(256)) + compressor.flush()


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
        assert "has changed or is truncated: got 88 of the 100 bytes" in str(cut_off)
        assert isinstance(gone, ImageError)

    def test_a_server_without_ranges_is_not_a_bad_image(self, web: Web) -> None:
        web.answers["/x.tar"] = body(self.DATA, ranges=False)
        assert self.read_ranges(web, [(0, 5)]) == [self.DATA[:5]]
        with pytest.raises(StorageUnavailable, match="does not support range requests"):
            self.read_ranges(web, [(512, 100)])

    def test_another_range_than_asked_for(self, web: Web) -> None:
        def wrong(request: Request) -> None:
            request.begin(206, Content_Length=100, Content_Range="bytes 0-99/1024")
            request.write(self.DATA[:100])

        web.answers["/x.tar"] = wrong
        with pytest.raises(StorageUnavailable, match="requested the bytes from 512, got those from 0"):
            self.read_ranges(web, [(512, 100)])
