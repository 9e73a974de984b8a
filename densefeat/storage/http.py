"""Read objects over http(s), where servers differ in ranges, in listings and in the status of a missing object.

fsspec accepts any body as the requested range, and treats every failure of ``exists`` as "no". Here a range is the
right bytes or an error, and only 404 and 410 mean that an object does not exist.
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
    """Read the whole object.

    Args:
        fs: fsspec's ``HTTPFileSystem``.
        url: of the object.

    Raises:
        FileNotFoundError: 404 or 410.
        PermissionError: 401 or 403, which some servers (S3 without ``s3:ListBucket``) also return for missing objects.
        OSError: any other failure.
    """
    return _run(fs, url, {}, ClientResponse.read)


def get_range(fs: Any, url: str, start: int, end: int) -> bytes:
    """Read bytes ``start`` (inclusive) to ``end`` (exclusive) of the object; fewer if it ends before.

    If the server does not support ranges, everything up to ``end`` is transferred and only the range is kept.

    Raises:
        OSError: as `get`.
    """

    async def take(response: ClientResponse) -> bytes:
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the object ends before ``start``
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
    """Whether the object exists.

    Raises:
        OSError: the response does not tell.
    """

    async def nothing(response: ClientResponse) -> bytes:
        return b""

    try:
        _run(fs, url, {}, nothing)
    except FileNotFoundError:
        return False
    return True


def _run(fs: Any, url: str, headers: dict[str, str], take: Any) -> bytes:
    """Send a GET request, and return the result of ``take`` for its response."""

    async def request() -> bytes:
        session = await fs.set_session()
        options = dict(fs.kwargs)
        # A range of a compressed body would be different bytes.
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", **headers}
        async with session.get(fs.encode_url(url), **options) as response:
            _check_status(response, url)
            return bytes(await take(response))

    try:
        return bytes(sync(fs.loop, request))
    except OSError:
        raise
    except ClientError as error:  # most of aiohttp's are not OSErrors, e.g. a truncated body or a closed connection
        raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error


def _check_status(response: ClientResponse, url: str) -> None:
    status, text = response.status, f"{url}: the server answered {response.status} {response.reason}"
    if status < 400 or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise FileNotFoundError(text)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise PermissionError(text)
    try:
        response.raise_for_status()
    except ClientError as error:
        raise OSError(text) from error  # the cause has the status, which densefeat.storage.retries needs


def _first_byte(response: ClientResponse, asked: int) -> int:
    """Offset in the object of the first byte of the body."""
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        if asked:
            _warn_about_missing_ranges(urlsplit(str(response.url)).netloc)
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else asked


@cache
def _warn_about_missing_ranges(host: str) -> None:
    logger.warning(
        "%s does not support range requests: to read a row, its shard is transferred from the start to the end of the "
        "row. For regular use, copy the store, or serve it with range requests (object stores, nginx, Caddy)",
        host,
    )
