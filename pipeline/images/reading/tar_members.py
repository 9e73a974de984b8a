"""Read tar members that are not a single byte range: sparse files, and broken links."""

import tarfile
from io import UnsupportedOperation
from typing import Any

from pipeline.errors import ImageError
from pipeline.images.listing.names import escaped
from pipeline.images.listing.ranged_file import Ahead, RangedFile
from pipeline.images.listing.tar_members import kind_of_member, open_tar
from pipeline.images.reading.fetch import Fetch, Outcome

__all__ = ["read_member"]

_HEADERS = Ahead(least=4 << 10, most=64 << 10, skip=1 << 20)


def read_member(uri: str, header: int, fetch: Fetch) -> Outcome:
    """Read one member, with zeros in its holes.

    Args:
        uri: of the tar.
        header: byte offset of the member's first header.
        fetch: reads ranges; its ``max_bytes`` is checked before memory for the member is allocated.

    Returns:
        The bytes; or an ``ImageError``: ``too_large``, or ``unreadable`` if the member is not a file, is damaged, or
        no longer exists.
    """
    file = RangedFile(lambda start, end: _range(uri, start, end, fetch), _HEADERS)
    file.seek(header)
    try:
        with open_tar(file) as tar:
            member = tar.next()
            if member is None:
                return ImageError("unreadable", f"{uri} has changed: there is no member at byte {header}.")
            return _read(uri, member, tar.offset, fetch)
    except ImageError as error:
        return error
    except (tarfile.TarError, ValueError, OverflowError, UnsupportedOperation) as error:
        return ImageError("unreadable", f"{uri}: the member at byte {header} is damaged, or has changed: {error}.")


def _read(uri: str, member: tarfile.TarInfo, end: int, fetch: Fetch) -> Outcome:
    name, kind = escaped(member.name), kind_of_member(member)
    if kind in ("symlink", "link"):
        target = escaped(member.linkname)
        return ImageError("unreadable", f"{uri}: the member {name} is a link to {target}, not a file in this tar.")
    if kind not in ("file", "sparse"):
        return ImageError("unreadable", f"{uri}: the member {name} is not a file.")
    if member.size > fetch.max_bytes:
        message = f"{uri}: the member {name} has {member.size} bytes, more than max_bytes={fetch.max_bytes}."
        return ImageError("too_large", message)
    sparse: Any = member.sparse  # a list of (start, length); typeshed is wrong
    segments = [(0, member.size)] if sparse is None else [(start, n) for start, n in sparse if n]
    stored = sum(n for _, n in segments)
    last = 0
    for start, n in segments:
        if start < last or n < 0 or start + n > member.size or stored > end - member.offset_data:
            message = f"{uri}: the member {name} is damaged: its map of data and holes does not fit its size."
            return ImageError("unreadable", message)
        last = start + n
    packed = memoryview(_range(uri, member.offset_data, member.offset_data + stored, fetch))
    if len(packed) < stored:
        message = f"{uri} is truncated in the member {name}: got {len(packed)} of {stored} bytes."
        return ImageError("unreadable", message)
    data = bytearray(member.size)
    for start, n in segments:
        data[start : start + n], packed = packed[:n], packed[n:]
    return bytes(data)


def _range(uri: str, start: int, end: int, fetch: Fetch) -> bytes:
    """Read bytes of the tar; fewer at its end.

    Raises:
        ImageError: the bytes cannot be read.
    """
    if start == end:
        return b""
    data = fetch(uri, start=start, end=end, nbytes=end - start)
    if isinstance(data, ImageError):
        raise data
    if len(data) > end - start:
        message = (
            f"Requested bytes {start} to {end} of {uri}, got {len(data)}: the server does not support range requests."
        )
        raise ImageError("unreadable", message)
    return data
