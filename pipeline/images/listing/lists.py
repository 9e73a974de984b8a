"""Lists of images that people write: a text file with one path or URI per line, or a CSV or TSV table with a header."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from densefeat.errors import PlaceError
from densefeat.storage.places import absolute_place, is_local, open_place, split_place
from densefeat.storage.retries import retried
from pipeline.errors import JobError
from pipeline.images.listing.files import Scan
from pipeline.images.listing.findings import Tally
from pipeline.images.listing.labels import LABEL_COLUMNS, no_labels, text_labels
from pipeline.images.listing.names import IMAGE_SUFFIXES, escaped, suffix_of
from pipeline.images.listing.parquet import IMAGE_COLUMNS, KEY_COLUMNS
from schemas.index import REFERENCES

__all__ = ["is_list", "scan_list"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TEXT = (".txt", ".lst")


class _Entries(NamedTuple):
    """The rows of a list: paths as written, keys, and labels, if it has any; an empty label is none."""

    paths: list[str]
    keys: list[str]
    labels: list[str] | None


def is_list(images: str) -> bool:
    """Whether a path or URI names a list, by its suffix: ``.txt``, ``.lst``, ``.csv``, ``.tsv``."""
    return suffix_of(images) in (*_TEXT, *_DELIMITERS)


def scan_list(
    images: str, *, image_column: str | None, storage_options: Mapping[str, Any] | None = None
) -> tuple[Scan, str | None]:
    """Read a list of images.

    A path that is not absolute starts from the folder of the list. Images may lie in several storages. Files are not
    looked up: an image that is missing fails its row.

    * Text: a path or URI per line. A label may follow, after white space, as in Caffe's lists (``cat/1.jpg 3``): the
      last word is one where the text before it ends in an image suffix, and the whole line does not. Empty lines and
      lines that start with ``#`` are skipped.
    * CSV, TSV: the image column is ``image_column``, or the first usual name; label and key columns are those of
      Parquet files (``pipeline.images.listing.parquet``).

    Args:
        images: the list.
        image_column: of a CSV or TSV file.
        storage_options: for the filesystem of the list.

    Returns:
        The rows in the order of the list, keyed by the path as written where there is no key column; and the column
        that holds the images, None for text.

    Raises:
        OSError: as the storage raises it.
        JobError: the file is no such list, or lacks the column.
        PlaceError: an entry is no path or URI.
    """
    filesystem, path = open_place(images, storage_options)
    data: bytes = retried(lambda: filesystem.cat_file(path), images)
    tally = Tally()
    if (delimiter := _DELIMITERS.get(suffix_of(images))) is None:
        if image_column is not None:
            raise JobError(f"Images {images!r}: got image_column={image_column!r}, but a text file has no columns.")
        entries = _text_entries(images, data)
    else:
        entries, image_column = _table_entries(images, data, delimiter, image_column, tally)
    rows = len(entries.paths)
    nothing = pa.nulls(rows, pa.int64())
    uris = list(_uris(images, entries.paths))
    references = pa.table([entries.keys, uris, nothing, nothing, nothing], schema=REFERENCES)
    labels = no_labels(rows) if entries.labels is None else text_labels(entries.labels)
    findings = tally.findings()
    lost = sum(finding.count for finding in findings if finding.about == "image")
    return Scan(references, labels, findings, rows + lost), image_column


def _text_entries(images: str, data: bytes) -> _Entries:
    paths: list[str] = []
    labels: list[str] = []
    for line in _decoded(data).splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            path, label = _path_and_label(text)
            paths.append(path)
            labels.append(escaped(label))
    if paths and not any("://" in path or suffix_of(path) in IMAGE_SUFFIXES for path in paths):
        raise JobError(
            f"Images {images!r}: got a text file whose first line is {escaped(paths[0])[:80]!r}, expected the path or "
            f"URI of an image on each line ({', '.join(IMAGE_SUFFIXES[:2])}, {IMAGE_SUFFIXES[8]}, …)."
        )
    return _Entries(paths, [escaped(path) for path in paths], labels)


def _path_and_label(line: str) -> tuple[str, str]:
    parts = line.rsplit(None, 1)
    if len(parts) == 2 and suffix_of(line) not in IMAGE_SUFFIXES and suffix_of(parts[0]) in IMAGE_SUFFIXES:
        return parts[0], parts[1]
    return line, ""


def _table_entries(
    images: str, data: bytes, delimiter: str, image_column: str | None, tally: Tally
) -> tuple[_Entries, str]:
    header, rows = _read_table(images, data, delimiter)
    names = (image_column,) if image_column is not None else IMAGE_COLUMNS
    image = next((name for name in names if name in header), None)
    if image is None:
        raise JobError(
            f"Images {images!r}: got the columns {', '.join(map(escaped, header)) or 'of an empty file'}; expected "
            f"{' or '.join(names)}. The first line must name the columns; select one with --image-column."
        )
    label = next((name for name in LABEL_COLUMNS if name in header), None)
    key = next((name for name in KEY_COLUMNS if name in header and name != image), None)
    named = [row for row in rows if row[header.index(image)].strip()]
    tally.add("image", f"rows with nothing in the column {image}", images, len(rows) - len(named))
    paths = [row[header.index(image)].strip() for row in named]
    keys = paths if key is None else [row[header.index(key)] for row in named]
    labels = None if label is None else [escaped(row[header.index(label)].strip()) for row in named]
    return _Entries(paths, [escaped(key) for key in keys], labels), image


def _read_table(images: str, data: bytes, delimiter: str) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the rows, each as long as the header."""
    reader = csv.reader(io.StringIO(_decoded(data), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            twice = sorted({escaped(name) for name in header if header.count(name) > 1})
            raise JobError(f"Images {images!r}: several columns are named {', '.join(twice)}: rename them.")
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                raise JobError(
                    f"Images {images!r}: line {reader.line_num} has {len(row)} fields, the header {len(header)}. "
                    "Quote fields that contain the delimiter."
                )
            if row:
                rows.append(row)
    except csv.Error as error:
        raise JobError(f"Images {images!r}: line {reader.line_num} cannot be parsed: {error}.") from error
    return header, rows


def _uris(images: str, paths: Sequence[str]) -> Iterator[str]:
    folder, _ = split_place(images)
    opened = {""}
    for path in paths:
        protocol = path.partition("://")[0] if "://" in path else ""
        try:
            if protocol not in opened:  # a storage that cannot be opened is found out now
                open_place(path)
                opened.add(protocol)
            if protocol or (":" in path and not is_local(absolute_place(path))):
                yield escaped(absolute_place(path))
                continue
        except PlaceError as error:
            raise PlaceError(f"Images {images!r}: {error}") from error
        if path.startswith("/") or is_local(folder):
            yield escaped(os.path.normpath(path if path.startswith("/") else f"{folder}/{path}"))
        else:
            yield absolute_place(f"{folder}/{path}")


def _decoded(data: bytes) -> str:
    """As the operating system names files: bytes that are not UTF-8 are surrogates. Without a byte order mark."""
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
