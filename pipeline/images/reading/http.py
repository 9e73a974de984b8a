"""Read an object, or a range of it, over HTTP: streamed, with limits on time and size.

fsspec's own ``cat_file`` has no such limits, and accepts any response as the requested range.
"""

import asyncio
import io
import re
import zlib
from typing import Any

from densefeat.errors import StorageUnavailable
from pipeline.images.reading.bounds import Bounds, TooLarge

__all__ = ["read_http"]

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/")
_DECODED = ("gzip", "x-gzip", "deflate")
_NOT_DECODED = ("br", "zstd", "compress", "x-compress")


async def read_http(filesystem: Any, url: str, start: int | None, end: int | None, limit: int, bounds: Bounds) -> bytes:
    """Read the body of ``url``, or its bytes from ``start`` (inclusive) to ``end`` (exclusive).

    Args:
        filesystem: fsspec's HTTP file system; its session, headers and other request options are used.
        url: to read.
        start: start of the range; None, as ``end``, for the whole body.
        end: end of the range; fewer bytes are returned if the object ends before it.
        limit: maximum number of bytes of a whole body.
        bounds: time limits.

    Raises:
        FileNotFoundError: status 404.
        TooLarge: the whole body has more than ``limit`` bytes.
        TimeoutError: the server sends nothing, or too slowly.
        StorageUnavailable: the server does not support range requests.
        ValueError: the content encoding is damaged or unknown.
        aiohttp.ClientError: any other error status; no connection, or a dropped one.
    """
    begun = asyncio.get_running_loop().time()
    deadline = asyncio.timeout_at(begun + bounds.for_bytes(0))
    received = 0
    try:
        async with deadline, await _request(filesystem, url, start, end, bounds) as response:
            if response.status == 416 and start is not None:
                return b""
            filesystem._raise_not_found_for_status(response, url)
            wanted = _wanted_bytes(response, url, start, end, limit)
            body = _Body(_encoding(response), wanted)
            async for data in response.content.iter_any():
                received += len(data)
                deadline.reschedule(begun + bounds.for_bytes(received))
                body.add(data)
                if body.is_full and start is not None:  # the server ignores the end of the range
                    break
                if body.is_full:
                    raise TooLarge(None)
            return body.finished()
    except TimeoutError as error:
        if not deadline.expired():
            raise
        seconds = asyncio.get_running_loop().time() - begun
        raise TimeoutError(f"incomplete response: only {received} bytes in {seconds:.0f} s") from error


async def _request(filesystem: Any, url: str, start: int | None, end: int | None, bounds: Bounds) -> Any:
    import aiohttp

    options = dict(filesystem.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if start is not None and end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = await filesystem.set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=bounds.connect_s, sock_read=bounds.between_bytes_s)
    # Decompressed here, with a limit: a megabyte can expand to a gigabyte.
    return await session.get(
        filesystem.encode_url(url), **{"timeout": timeout, **options}, headers=headers, auto_decompress=False
    )


def _encoding(response: Any) -> str:
    return str(response.headers.get("Content-Encoding", "")).strip().lower()


def _wanted_bytes(response: Any, url: str, start: int | None, end: int | None, limit: int) -> int:
    """Check that the response is the requested one; return the number of bytes to read from the body."""
    if start is None or end is None:
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > limit:
            raise TooLarge(int(length))
        return limit
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    first = int(match[1]) if match else 0
    if first != start or _encoding(response) in _DECODED + _NOT_DECODED:  # a range of encoded bytes is useless
        raise StorageUnavailable(
            f"{url}: requested the bytes from {start}, got those from {first} (status {response.status}, content "
            f"encoding {_encoding(response) or 'none'}). The server, or a proxy before it, does not support range "
            "requests: use one that does, or copy the dataset"
        )
    return end - start


class _Body:
    """The part of a body received so far, decoded; at most one byte more than wanted."""

    def __init__(self, encoding: str, wanted: int) -> None:
        if encoding in _NOT_DECODED:
            raise ValueError(f"the server sends content encoding {encoding}, although none was requested")
        self._decoder = zlib.decompressobj(wbits=47) if encoding in _DECODED else None  # 47: gzip or zlib header
        self._wanted = wanted
        self._data = io.BytesIO()

    @property
    def is_full(self) -> bool:
        return self._data.tell() > self._wanted

    def add(self, data: bytes) -> None:
        remaining = self._wanted + 1 - self._data.tell()
        if self._decoder is not None:
            try:
                data = self._decoder.decompress(data, remaining)
            except zlib.error as error:
                raise ValueError(f"the content encoding is damaged: {error}") from error
        self._data.write(data[:remaining])

    def finished(self) -> bytes:
        if self._decoder is not None and not self._decoder.eof and not self.is_full:
            raise ValueError("the content encoding is truncated")
        self._data.truncate(min(self._data.tell(), self._wanted))
        return self._data.getvalue()
