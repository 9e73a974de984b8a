"""An S3 server between a client and another one, that can do less, or loses answers."""

import http.client
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_NOT_FORWARDED = ("connection", "transfer-encoding", "date", "server", "content-length", "expect", "keep-alive")


class S3Proxy:
    """What to do to requests, by a function of (method, path): "" to pass one on, or the name of a fault.

    "503", "403": answered so. "lose": passed on, and the connection closed without an answer. "drop-…": the header
    of that name is not passed on.
    """

    def __init__(self, endpoint: str) -> None:
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.seen: list[tuple[str, str]] = []
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
                    code = {"503": "ServiceUnavailable", "403": "AccessDenied"}[fault]
                    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                    self.answer(int(fault), {"Content-Type": "application/xml"}, text)
                    return
                dropped = fault.removeprefix("drop-").lower() if fault.startswith("drop-") else ""
                headers = {name: value for name, value in self.headers.items() if name.lower() != dropped}
                connection = http.client.HTTPConnection(address.hostname or "", address.port)
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                content = response.read()
                connection.close()
                if fault == "lose":
                    self.close_connection = True
                    return
                self.answer(response.status, dict(response.getheaders()), content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in _NOT_FORWARDED:
                        self.send_header(name, value)
                length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
