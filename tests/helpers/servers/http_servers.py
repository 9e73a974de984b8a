"""HTTP servers as they differ in the world: with and without ranges, with and without listings."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_PIECE = 1 << 16


@dataclass
class Server:
    """A folder over HTTP.

    Attributes:
        folder: what is served.
        ranges: whether ranges are honoured; else the whole object comes with 200.
        listing: whether folders are listed; else the answer is ``absent``.
        absent: status of what is not there; S3 says 403 to those who may not list.
        failing: statuses by path: these answers instead of the object's, for ever.
        cut_off: the body ends after so many bytes, and the connection with it.
        uri: where it is.
        requests: "METHOD path" of all requests so far.
        authorizations: that were sent with them.
        sent: bytes of bodies that were written.
    """

    folder: Path
    ranges: bool = True
    listing: bool = False
    absent: int = 404
    failing: dict[str, int] = field(default_factory=dict)
    cut_off: int | None = None
    uri: str = ""
    requests: list[str] = field(default_factory=list)
    authorizations: set[str | None] = field(default_factory=set)
    sent: int = 0


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, server: Server, *args: Any, **kwargs: Any) -> None:
        self.told = server
        super().__init__(*args, directory=str(server.folder), **kwargs)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.told.requests.append(f"{self.command} {self.path}")
        self.told.authorizations.add(self.headers.get("Authorization"))
        status = self.told.failing.get(self.path)
        path = Path(self.translate_path(self.path))
        if status is not None:
            self.send_error(status)
        elif path.is_dir() and self.told.listing:
            super().do_GET()
        elif not path.is_file():
            self.send_error(self.told.absent)
        else:
            self._send(path.read_bytes(), body=body)

    def _send(self, data: bytes, *, body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and self.told.ranges:
            first, last = self._limits(asked, len(data))
            if first >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
            data = data[first:last]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes" if self.told.ranges else "none")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
                data = data[: self.told.cut_off]
                for first in range(0, len(data), _PIECE):
                    self.told.sent += len(data[first : first + _PIECE])
                    self.wfile.write(data[first : first + _PIECE])
            self.close_connection = self.close_connection or self.told.cut_off is not None

    @staticmethod
    def _limits(asked: re.Match[str], size: int) -> tuple[int, int]:
        if not asked[1]:  # the last so many
            return max(size - int(asked[2]), 0), size
        return int(asked[1]), min(int(asked[2]) + 1, size) if asked[2] else size


@contextmanager
def serve(folder: str | Path, **options: Any) -> Iterator[Server]:
    """A server of its own, on a free port of this machine."""
    told = Server(Path(folder), **options)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, told)) as server:
        server.daemon_threads = True
        told.uri = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
