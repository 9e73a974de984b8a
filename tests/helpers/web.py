"""A web server on this machine whose answers tests decide."""

import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
