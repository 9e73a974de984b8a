"""An S3 server between a client and another one, that can do less, be slow, lose answers, or refuse wrong clocks."""

import http.client
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_NOT_FORWARDED = ("connection", "transfer-encoding", "date", "server", "content-length", "expect", "keep-alive")
_MOST_SKEW_S = 15 * 60  # of S3
_HANG_S = 120.0


class S3Proxy:
    """What to do to requests, by a function of (method, path): "" to pass one on, or the name of a fault.

    "503", "403": answered so. "lose": passed on, and the connection closed without an answer. "cut": closed without
    an answer, and not passed on. "hang": never answered. "drop-…": the header of that name is not passed on. A function
    that waits delays the request.

    Args:
        endpoint: of the other server.
        checks_clocks: whether requests that were signed more than 15 minutes ago, or ahead of time, are refused.

    Attributes:
        fault: the function; it may be called by several threads at once.
        passed: called with (method, path, body, status) of each request that the other server has answered, whatever
            becomes of the answer.
        seen: method and path of all requests.
        skewed: number of requests that were refused for their clock.
    """

    def __init__(self, endpoint: str, *, checks_clocks: bool = False) -> None:
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.passed: Callable[[str, str, bytes, int], None] = lambda method, path, body, status: None
        self.seen: list[tuple[str, str]] = []
        self.skewed = 0
        proxy, address = self, urllib.parse.urlsplit(endpoint)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    raise NotImplementedError("chunked requests")
                proxy.seen.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
                if fault in ("503", "403"):
                    self.refuse(int(fault), {"503": "ServiceUnavailable", "403": "AccessDenied"}[fault])
                elif checks_clocks and _is_skewed(self.headers.get("x-amz-date")):
                    proxy.skewed += 1
                    self.refuse(403, "RequestTimeTooSkewed")
                elif fault in ("cut", "hang"):
                    time.sleep(_HANG_S if fault == "hang" else 0)
                    self.close_connection = True
                else:
                    self.pass_on(body, fault)

            def pass_on(self, body: bytes, fault: str) -> None:
                dropped = fault.removeprefix("drop-").lower() if fault.startswith("drop-") else ""
                headers = {name: value for name, value in self.headers.items() if name.lower() != dropped}
                connection = http.client.HTTPConnection(address.hostname or "", address.port)
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                content = response.read()
                connection.close()
                proxy.passed(self.command, self.path, body, response.status)
                if fault == "lose":
                    self.close_connection = True
                    return
                self.answer(response.status, dict(response.getheaders()), content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def refuse(self, status: int, code: str) -> None:
                text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.answer(status, {"Content-Type": "application/xml"}, text)

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                with suppress(ConnectionError):  # the client is gone
                    self.send_response(status)
                    for name, value in headers.items():
                        if name.lower() not in _NOT_FORWARDED:
                            self.send_header(name, value)
                    length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
                    of_head = self.command == "HEAD" and length
                    self.send_header("Content-Length", length if of_head and length else str(len(content)))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *arguments: object) -> None:
                """A client that was killed in a request is no error of the server."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["S3Proxy"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def _is_skewed(signed_at: str | None) -> bool:
    if signed_at is None:
        return False
    then = datetime.strptime(signed_at, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return abs((datetime.now(UTC) - then).total_seconds()) > _MOST_SKEW_S
