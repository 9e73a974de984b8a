"""A web server on this machine whose answers tests decide."""

import http.server
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.errors import ImageError
from pipeline.images.reading.bounds import Bounds
from pipeline.images.reading.read import read_images
from schemas.index import REFERENCES

__all__ = ["Answer", "Request", "Web", "body", "serving", "status"]


class Request(http.server.BaseHTTPRequestHandler):
    """One request; an answer writes to it."""

    protocol_version = "HTTP/1.1"
    web: "Web"

    def do_GET(self) -> None:
        web = self.web
        with web.lock:
            web.asked[self.path] += 1
            left = web.faults.get(self.path, [])
            answer = left.pop(0) if left else web.answers.get(self.path, status(404))
        try:
            if web.closing.is_set():  # a connection that was kept must not outlive its server
                raise ConnectionResetError
            answer(self)
        except OSError:  # the client has gone
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *arguments: object) -> None:
        pass

    def begin(self, code: int, **headers: object) -> None:
        """Send the head; underscores in the names of headers stand for dashes."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        if self.command != "HEAD":
            self.wfile.write(data)
            self.wfile.flush()


Answer = Callable[[Request], None]


@dataclass
class Web:
    """What a server does.

    Attributes:
        url: of its root, without a slash at the end.
        answers: by path.
        faults: by path, answers that come before that, once each.
        asked: how often, by path.
        closing: set when the server ends: for answers that wait.
    """

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    faults: dict[str, list[Answer]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def status(code: int, **headers: object) -> Answer:
    """An answer without a body."""
    return lambda request: request.begin(code, Content_Length=0, **headers)


def body(data: bytes, *, ranges: bool = True, **headers: object) -> Answer:
    """An object; the server reads ranges, or ignores them."""

    def answer(request: Request) -> None:
        asked = request.headers.get("Range") if ranges else None
        if asked is None:
            request.begin(200, Content_Length=len(data), **headers)
            request.write(data)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1, len(data))
        if start >= len(data):
            request.begin(416, Content_Length=0, Content_Range=f"bytes */{len(data)}")
            return
        content_range = f"bytes {start}-{end - 1}/{len(data)}"
        request.begin(206, Content_Length=end - start, Content_Range=content_range, **headers)
        request.write(data[start:end])

    return answer


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *arguments: object) -> None:
        """Clients that hang up are no news."""


@contextmanager
def serving() -> Iterator[Web]:
    """A server for the time of the block."""
    web = Web()
    handler = type("Request", (Request,), {"web": web})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


BOUNDS = Bounds(connect_s=1.0, between_bytes_s=0.6, slack_s=1.2, bytes_per_s=100e6, in_all_s=3.0)
PATIENCE_S = 0.8


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
