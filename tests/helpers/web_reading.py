"""Reading from servers that fail, lie, or never end."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipeline.errors import ImageError
from pipeline.images.reading.bounds import Bounds
from pipeline.images.reading.read import read_images
from schemas.index import REFERENCES
from tests.helpers.web import Answer, Request, Web, status

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
