"""One object, or a range of it, over HTTP: streamed, within bounds of time and size.

fsspec's own ``cat_file`` holds whatever comes for as long as it comes, and takes any answer for the range asked for.
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
    """The body of ``url``, or its bytes from ``start`` (inclusive) to ``end`` (exclusive).

    Args:
        filesystem: fsspec's for HTTP: its session, headers and other options of requests are used.
        url: what to get.
        start: None for all of it; with ``end``.
        end: with ``start``; fewer bytes come where the object ends before.
        limit: of bytes, for all of it.
        bounds: of time.

    Raises:
        FileNotFoundError: status 404.
        TooLarge: there are more than ``limit`` bytes.
        TimeoutError: the server sends nothing, or too slowly.
        StorageUnavailable: the server does not read ranges.
        ValueError: its content encoding is damaged, or an unknown one.
        aiohttp.ClientError: any other status of failure; a connection that cannot be had, or is cut.
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
                if body.is_full and start is not None:  # a server that ignores the end of a range
                    break
                if body.is_full:
                    raise TooLarge(None)
            return body.finished()
    except TimeoutError as error:
        if not deadline.expired():
            raise
        seconds = asyncio.get_running_loop().time() - begun
        raise TimeoutError(f"only {received} bytes in {seconds:.0f} s, and no end") from error


async def _request(filesystem: Any, url: str, start: int | None, end: int | None, bounds: Bounds) -> Any:
    import aiohttp

    options = dict(filesystem.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if start is not None and end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = await filesystem.set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=bounds.connect_s, sock_read=bounds.between_bytes_s)
    # Decompressed here, bounded: a megabyte can become a gigabyte.
    return await session.get(
        filesystem.encode_url(url), **{"timeout": timeout, **options}, headers=headers, auto_decompress=False
    )


def _encoding(response: Any) -> str:
    return str(response.headers.get("Content-Encoding", "")).strip().lower()


def _wanted_bytes(response: Any, url: str, start: int | None, end: int | None, limit: int) -> int:
    """How many bytes of the body are wanted, if it is the one asked for."""
    if start is None or end is None:
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > limit:
            raise TooLarge(int(length))
        return limit
    found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    begins = int(found[1]) if found else 0
    if begins != start or _encoding(response) in _DECODED + _NOT_DECODED:  # a range of what is encoded is no use
        raise StorageUnavailable(
            f"{url}: asked for the bytes from {start} on, got those from {begins} on (status {response.status}, "
            f"content encoding {_encoding(response) or 'none'}). Its server, or a proxy before it, does not read "
            "ranges: use one that does, or copy the dataset"
        )
    return end - start


class _Body:
    """What has come of it, decoded, at most one byte more than wanted."""

    def __init__(self, encoding: str, wanted: int) -> None:
        if encoding in _NOT_DECODED:
            raise ValueError(f"its server sends it encoded as {encoding}, although asked for none")
        self._decoder = zlib.decompressobj(wbits=47) if encoding in _DECODED else None  # 47: gzip's or zlib's header
        self._wanted = wanted
        self._data = io.BytesIO()

    @property
    def is_full(self) -> bool:
        return self._data.tell() > self._wanted

    def add(self, data: bytes) -> None:
        room = self._wanted + 1 - self._data.tell()
        if self._decoder is not None:
            try:
                data = self._decoder.decompress(data, room)
            except zlib.error as error:
                raise ValueError(f"its content encoding is damaged: {error}") from error
        self._data.write(data[:room])

    def finished(self) -> bytes:
        if self._decoder is not None and not self._decoder.eof and not self.is_full:
            raise ValueError("its content encoding is cut off")
        self._data.truncate(min(self._data.tell(), self._wanted))
        return self._data.getvalue()
