"""Encoded photographs where the index refers to: files, members of tars, rows of Parquet files."""

import base64
import io
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from densefeat.errors import DensefeatError
from densefeat.page.cache import ByteCache
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import cell_content
from densefeat.storage.places import is_local, split_place

__all__ = ["PhotographMissing", "References", "read_file", "unescaped"]

Cell = bytes | str | None

_MAX_BYTES = 128 << 20
_PATIENCE_S = 5.0  # somebody is waiting
_BUFFER_BYTES = 4 << 20
_HEADER_BYTES = 64 << 10
_CELLS_BYTES = 64 << 20
_OPEN_FILES = 8
_LONGEST_URI = 8192  # characters; signed URLs have thousands
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}=*\s*")


class PhotographMissing(DensefeatError):  # noqa: N818 - says what is missing
    """The photograph of a row cannot be read or decoded; the message says why."""


class References:
    """Reads what the rows of an index refer to. Thread-safe.

    Args:
        kind: of the source in the store's configuration: ``"folder"``, ``"list"``, ``"tar"`` or ``"parquet"``.
        column: Parquet: the column that holds the images.
    """

    def __init__(self, kind: str, column: str | None = None) -> None:
        self._kind = kind
        self._parquet = _ParquetFiles(column) if kind == "parquet" and column is not None else None

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The encoded photograph of a row of the index.

        Raises:
            PhotographMissing: there is none, it is too large, or the file has changed.
            Exception: as the storage, pyarrow or tarfile raise it.
        """
        uri = unescaped(row["uri"]) if is_local(row["uri"]) else row["uri"]
        offset, nbytes = row["offset"], row["nbytes"]
        if self._kind not in ("tar", "parquet"):
            return read_file(uri)
        if offset is None:
            raise PhotographMissing(f"has no recorded place in {uri}")
        if self._kind == "tar":
            return _whole_member(uri, offset, nbytes) if nbytes is not None else _sparse_member(uri, offset)
        if self._parquet is None:
            raise PhotographMissing(f"is in {uri}, and the store does not name its column: pass --images")
        return _image_in(self._parquet.cell(uri, offset), uri)


def read_file(uri: str) -> bytes:
    """Read a file, at most 128 MiB, by its exact name.

    Raises:
        PhotographMissing: it is larger.
        FileNotFoundError, OSError: as the storage raises them.
    """
    objects, name = _located(uri)
    data = objects.get_range(name, 0, _MAX_BYTES + 1)
    _check_size(len(data))
    return data


def unescaped(name: str) -> str:
    r"""The name of a local file. In the index, each byte that is not UTF-8 is ``\xHH``, as in ``caf\xe9.jpg``."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape"), name)


def _located(uri: str) -> tuple[Objects, str]:
    if is_local(uri):
        folder, name = split_place(uri)
        return _objects(folder), name
    protocol, _, path = uri.partition("://")
    bucket, _, name = path.partition("/")
    if "//" in name and "::" not in uri and not protocol.lower().startswith("http"):
        return _objects(f"{protocol}://{bucket}"), name  # slashes are part of a name; in a folder they would be merged
    folder, name = split_place(uri)
    return _objects(folder), name


@lru_cache(maxsize=64)
def _objects(folder: str) -> Objects:
    return Objects(folder, patience_s=_PATIENCE_S)


def _check_size(nbytes: int) -> None:
    if nbytes > _MAX_BYTES:
        raise PhotographMissing(f"is larger than {_MAX_BYTES:,} bytes, the most that the page reads")


def _whole_member(uri: str, offset: int, nbytes: int) -> bytes:
    _check_size(nbytes)
    objects, name = _located(uri)
    data = objects.get_range(name, offset, offset + nbytes)
    if len(data) != nbytes:
        raise PhotographMissing(f"is not complete: {uri} ends before byte {offset + nbytes:,}; the file has changed")
    return data


def _sparse_member(uri: str, offset: int) -> bytes:
    """A member that is not one range of bytes; ``offset`` is that of its header."""
    raw = io.BufferedReader(_Ranges(uri), _HEADER_BYTES)
    raw.seek(offset)
    with raw, tarfile.open(fileobj=raw, mode="r:") as tar:
        member = tar.next()
        file = tar.extractfile(member) if member is not None and member.isreg() else None
        if member is None or file is None:
            raise PhotographMissing(f"is no file in {uri}: a link that leads nowhere, or the tar has changed")
        _check_size(member.size)
        return file.read()


class _Ranges(io.RawIOBase):
    """A file object whose reads are range requests."""

    def __init__(self, uri: str) -> None:
        self._objects, self._name = _located(uri)
        size = self._objects.size(self._name)
        if size is None:
            raise FileNotFoundError(uri)
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        data = self._objects.get_range(self._name, self._position, end) if end > self._position else b""
        if len(data) < end - self._position:
            raise EOFError("the file has become shorter")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _ParquetFiles:
    """Cells of the image column of Parquet files.

    A row can only be reached from the start of its row group. So the page reads on from where it is, and keeps the
    cells that it passes: the rows of one page of the wall are read in one pass.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._cells: ByteCache[Cell] = ByteCache(_CELLS_BYTES, lambda cell: len(cell or b""))
        self._files: OrderedDict[str, _ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    def cell(self, uri: str, row: int) -> Cell:
        """The image of a row as stored: bytes, text, or None if it is null."""
        return self._cells.get((uri, row), lambda: self._read(uri, row))

    def _read(self, uri: str, row: int) -> Cell:
        with self._lock:
            file = self._files.setdefault(uri, _ParquetFile(uri, self._column))
            self._files.move_to_end(uri)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        with file.lock:  # another request may have passed the row while this one waited
            return self._cells.get((uri, row), lambda: self._read_on(uri, file, row))

    def _read_on(self, uri: str, file: "_ParquetFile", wanted: int) -> Cell:
        found: Cell = None
        try:
            for row, cell in file.until(wanted):
                self._keep(uri, row, cell)
                found = cell if row == wanted else found
        except BaseException:
            with self._lock:  # opened again by the next request
                self._files.pop(uri, None)
            raise
        return found

    def _keep(self, uri: str, row: int, cell: Cell) -> None:
        self._cells.get((uri, row), lambda: cell)


class _ParquetFile:
    """One column of a Parquet file, read forwards.

    Args:
        uri: of the file, opened when it is first read.
        column: of type binary, string or ``struct<bytes, path>``.
    """

    def __init__(self, uri: str, column: str) -> None:
        self.lock = threading.Lock()
        self._uri, self._column = uri, column
        self._file: pq.ParquetFile | None = None
        self._group, self._next = -1, 0  # the row group that is being read, and its next row in the file
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def until(self, row: int) -> Iterator[tuple[int, Cell]]:
        """Rows and their cells, from where the last call ended (or the start of the row group) to the batch of ``row``.

        Raises:
            PhotographMissing: the file has no such row, or no such column.
        """
        if self._file is None:
            self._file = _opened(self._uri)
        metadata = self._file.metadata
        if row >= metadata.num_rows:
            raise PhotographMissing(f"was row {row} of {self._uri}, which has {metadata.num_rows} now: it has changed")
        if self._column not in self._file.schema_arrow.names:
            raise PhotographMissing(f"was in the column {self._column!r} of {self._uri}, which is gone: it has changed")
        ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        group = next(number for number, end in enumerate(ends) if row < end)
        if group != self._group or row < self._next:
            self._group, self._next = group, ends[group - 1] if group else 0
            rows = _rows_at_once(metadata.row_group(group), self._column)
            self._batches = self._file.iter_batches(rows, row_groups=[group], columns=[self._column], use_threads=False)
        while self._next <= row:
            for value in next(self._batches).column(0):
                yield self._next, cell_content(value)
                self._next += 1


def _opened(uri: str) -> pq.ParquetFile:
    # No pre_buffer: it would hold whole column chunks in memory.
    return pq.ParquetFile(
        io.BufferedReader(_Ranges(uri), _BUFFER_BYTES), pre_buffer=False, buffer_size=_BUFFER_BYTES
    )  # fmt: skip


def _rows_at_once(group: Any, column: str) -> int:
    """Rows whose images have about 4 MiB together."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    own = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column.partition(".")[0]]
    nbytes = sum(chunk.total_uncompressed_size for chunk in own)
    return int(max(1, min(group.num_rows, _BUFFER_BYTES * group.num_rows // max(nbytes, 1))))


def _image_in(cell: Cell, parquet_uri: str) -> bytes:
    if cell is None:
        raise PhotographMissing(f"is null in {parquet_uri}")
    if isinstance(cell, bytes):
        _check_size(len(cell))
        return cell
    if (inline := _inline_image(cell)) is not None:
        return inline
    if len(cell) > _LONGEST_URI:
        raise PhotographMissing(f"is a text of {len(cell):,} characters in {parquet_uri}, neither a path nor base64")
    if "://" in cell:
        return read_file(cell)
    return read_file(cell if cell.startswith("/") else f"{parquet_uri.rpartition('/')[0]}/{cell}")


def _inline_image(text: str) -> bytes | None:
    """The image that a ``data:`` URI or base64 (either alphabet) contains; None if the text is a path or a URI."""
    if text[:5].lower() == "data:":
        header, _, data = text.partition(",")
        if not header.lower().rstrip().endswith(";base64"):
            return unquote_to_bytes(data)
        return _from_base64(unquote_to_bytes(data).decode("ascii", "replace"))
    if not _BASE64.fullmatch(text):
        return None
    try:  # a long path without a suffix can be base64, too
        image = _from_base64(text)
        with Image.open(io.BytesIO(image)):
            return image
    except (ValueError, OSError):
        return None


def _from_base64(text: str) -> bytes:
    plain = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
