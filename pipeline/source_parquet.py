"""Parquet files as references: one row an image; only the schema, the labels and the keys are read here."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.errors import JobError
from pipeline.source_files import uri_of
from schemas.index import REFERENCES

__all__ = ["Columns", "find_columns", "is_uri_type", "scan_parquet"]

_IMAGE_COLUMNS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "uri", "url", "path", "file_name",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "cls", "labels")
_KEY_COLUMNS = ("__key__", "key", "id", "image_id")


class Columns(NamedTuple):
    """Which columns of a dataset are what."""

    image: str
    label: str | None
    key: str | None
    class_names: tuple[str, ...]


def find_columns(filesystem: AbstractFileSystem, path: str, image_column: str | None) -> Columns:
    """Decide from one file's schema which columns hold the images, the labels and the keys.

    The image column is binary, a string (a path or URI), or Hugging Face's ``struct<bytes, path>``: the one given, or
    the first of a list of usual names. The label is an integer column ``label``, ``cls`` or ``labels``, its class
    names are from Hugging Face's metadata. The key is ``__key__``, ``key``, ``id`` or ``image_id``.

    Raises:
        JobError: there is no such image column (it lists those there are), or the file is not Parquet.
    """
    with _opened(filesystem, path) as file:
        schema = file.schema_arrow
    names = _IMAGE_COLUMNS if image_column is None else (image_column,)
    image = next((name for name in names if _has(schema, name, _is_image_type)), None)
    if image is None:
        raise _no_image_column(uri_of(filesystem, path), schema, names)
    label = next((name for name in _LABEL_COLUMNS if _has(schema, name, pa.types.is_integer)), None)
    key = next((name for name in _KEY_COLUMNS if name != image and _has(schema, name, _is_key_type)), None)
    return Columns(image, label, key, _class_names(schema, label))


def scan_parquet(filesystem: AbstractFileSystem, path: str, limit: int | None, *, columns: Columns) -> pa.Table:
    """List the rows of one Parquet file.

    Without a key column, the key is the path in the image column where there is one, else ``<file stem>:<row>``.

    Returns:
        ``REFERENCES``, at most ``limit`` rows; ``offset`` is the row in the file.

    Raises:
        JobError: the file lacks one of the columns, or is not Parquet.
    """
    uri = uri_of(filesystem, path)
    with _opened(filesystem, path) as file:
        schema = file.schema_arrow
        if not _has(schema, columns.image, _is_image_type):
            raise _no_image_column(uri, schema, (columns.image,))
        image_type = schema.field(columns.image).type
        wanted = [name for name in (columns.label, columns.key) if name is not None and name in schema.names]
        if columns.key is None and pa.types.is_struct(image_type):
            wanted.append(f"{columns.image}.path")
        elif columns.key is None and is_uri_type(image_type):
            wanted.append(columns.image)
        rows = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
        table = _read_rows(file, wanted, rows)
    stem = PurePosixPath(path).stem
    keys = [f"{stem}:{row}" if key is None else key for row, key in enumerate(_keys(table, columns, rows))]
    nothing = pa.nulls(rows, pa.int64())
    return pa.table([keys, [uri] * rows, range(rows), nothing, _labels(table, columns, rows)], schema=REFERENCES)


def is_uri_type(kind: pa.DataType) -> bool:
    """Tell whether values of this type name an image rather than hold it."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


@contextmanager
def _opened(filesystem: AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    with filesystem.open(path, "rb") as raw:
        try:
            yield pq.ParquetFile(raw)
        except pa.ArrowInvalid as error:
            raise JobError(
                f"Parquet {uri_of(filesystem, path)}: truncated, damaged, or not Parquet ({error}). Copy or make it "
                "again, or leave it out; nothing has been computed yet."
            ) from error


def _has(schema: pa.Schema, name: str, accepts: Callable[[pa.DataType], bool]) -> bool:
    return name in schema.names and bool(accepts(schema.field(name).type))


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    return is_uri_type(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_key_type(kind: pa.DataType) -> bool:
    return is_uri_type(kind) or pa.types.is_integer(kind)


def _no_image_column(uri: str, schema: pa.Schema, names: Sequence[str]) -> JobError:
    there = ", ".join(f"{field.name}: {field.type}" for field in schema)
    return JobError(
        f"Parquet {uri}: no image column. Expected {' or '.join(map(repr, names))} of type binary, string or "
        f"struct<bytes, path>; got the columns {there}. Name the right one as image_column."
    )


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """From Hugging Face's ClassLabel, which keeps them as JSON in the schema's metadata."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(str(name) for name in names)


def _read_rows(file: pq.ParquetFile, columns: list[str], rows: int) -> pa.Table:
    groups: list[int] = []
    total = 0
    while total < rows:
        total += file.metadata.row_group(len(groups)).num_rows
        groups.append(len(groups))
    # In this thread: see densefeat/parquet.py.
    return file.read_row_groups(groups, columns=columns, use_threads=False).slice(0, rows)


def _keys(table: pa.Table, columns: Columns, rows: int) -> list[str | None]:
    name = columns.image if columns.key is None else columns.key
    if name not in table.column_names:
        return [None] * rows
    values = table[name].combine_chunks()
    if pa.types.is_struct(values.type):
        index = values.type.get_field_index("path")
        if index < 0:
            return [None] * rows
        values = pc.struct_field(values, index)
    keys: list[str | None] = values.cast(pa.string()).to_pylist()
    return keys


def _labels(table: pa.Table, columns: Columns, rows: int) -> pa.ChunkedArray | pa.Array:
    if columns.label is None or columns.label not in table.column_names:
        return pa.nulls(rows, pa.int64())
    labels = table[columns.label].cast(pa.int64())
    if not columns.class_names:
        return labels
    # Hugging Face writes -1 where a test set hides its labels.
    return pc.if_else(pc.less(labels, 0), pa.scalar(None, pa.int64()), labels)
