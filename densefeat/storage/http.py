"""Reading objects over http(s), where servers differ: in ranges, in listings, in what they say of an absent object.

fsspec takes whatever body comes for the range that was asked, and any failure of ``exists`` for "no". Here a range is
the right bytes or an error, and only 404 and 410 mean that an object is not there.
"""

import logging
import re
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponse
from fsspec.asyn import sync

__all__ = ["exists", "get", "get_range"]

logger = logging.getLogger(__name__)

_READ_AT_ONCE = 1 << 16


def get(fs: Any, url: str) -> bytes:
    """The whole object.

    Args:
        fs: fsspec's ``HTTPFileSystem``.
        url: of the object.

    Raises:
        FileNotFoundError: 404 or 410.
        PermissionError: 401 or 403, which some servers (S3 without ``s3:ListBucket``) say of absent objects too.
        OSError: any other failure.
    """
    return _run(fs, url, {}, ClientResponse.read)


def get_range(fs: Any, url: str, start: int, end: int) -> bytes:
    """Bytes ``start`` (inclusive) to ``end`` (exclusive) of the object, fewer if it ends before.

    Of a server without ranges everything up to ``end`` is transferred, and only the range is kept.

    Raises:
        OSError: as `get`.
    """

    async def take(response: ClientResponse) -> bytes:
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the object ends before
            return b""
        skip = start - _first_byte(response, start)
        if skip < 0:
            raise OSError(f"{url}: the server sent another range than bytes {start} to {end}")
        taken = bytearray()
        async for part in response.content.iter_chunked(_READ_AT_ONCE):
            taken += part[skip : skip + end - start - len(taken)]
            skip = max(skip - len(part), 0)
            if len(taken) == end - start:
                break
        return bytes(taken)

    if start >= end:
        return b""
    return _run(fs, url, {"Range": f"bytes={start}-{end - 1}"}, take)


def exists(fs: Any, url: str) -> bool:
    """Whether the object is there.

    Raises:
        OSError: the server does not tell.
    """

    async def nothing(response: ClientResponse) -> bytes:
        return b""

    try:
        _run(fs, url, {}, nothing)
    except FileNotFoundError:
        return False
    return True


def _run(fs: Any, url: str, headers: dict[str, str], take: Any) -> bytes:
    """What ``take`` makes of the response to a GET."""

    async def request() -> bytes:
        session = await fs.set_session()
        options = dict(fs.kwargs)
        # Of compressed bytes a range would be another one.
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", **headers}
        async with session.get(fs.encode_url(url), **options) as response:
            _check_status(response, url)
            return bytes(await take(response))

    try:
        return bytes(sync(fs.loop, request))
    except OSError:
        raise
    except ClientError as error:  # most of aiohttp's are no OSError: a body that ends early, a server that hangs up
        raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error


def _check_status(response: ClientResponse, url: str) -> None:
    status, text = response.status, f"{url}: the server says {response.status} {response.reason}"
    if status < 400 or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise FileNotFoundError(text)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise PermissionError(text)
    try:
        response.raise_for_status()
    except ClientError as error:
        raise OSError(text) from error  # the cause holds the status: densefeat.storage.retries asks for it


def _first_byte(response: ClientResponse, asked: int) -> int:
    """Where in the object the body begins."""
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        if asked:
            _warn_of_no_ranges(urlsplit(str(response.url)).netloc)
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else asked


@cache
def _warn_of_no_ranges(host: str) -> None:
    logger.warning(
        "%s has no range requests: to read a row, its shard is transferred from its beginning to the end of the row. "
        "For more than a look, copy the store, or serve it with ranges (object stores, nginx, Caddy)",
        host,
    )
