"""List Parquet files as references, one row per image; reads only the schema, labels and keys."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from densefeat.storage.retries import retried
from pipeline.errors import JobError
from pipeline.images.listing.files import Scan, uri_of
from pipeline.images.listing.findings import Tally
from pipeline.images.listing.inline import is_inline_image
from pipeline.images.listing.labels import LABEL_COLUMNS, Labels, column_labels, no_labels
from pipeline.images.listing.names import escaped
from schemas.index import REFERENCES

__all__ = ["IMAGE_COLUMNS", "KEY_COLUMNS", "image_column_of", "scan_parquet"]

IMAGE_COLUMNS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "uri", "url", "path", "file_name",
)  # fmt: skip
KEY_COLUMNS = ("__key__", "key", "id", "image_id")
_LONGEST_KEY = 1024  # bytes, the limit of S3


class _Columns(NamedTuple):
    """The columns of a file that hold images, labels and keys."""

    image: str
    label: str | None
    key: str | None
    class_names: tuple[str, ...]


def image_column_of(filesystem: AbstractFileSystem, path: str, image_column: str | None) -> str:
    """Find the image column in one file's schema: the requested one, or the first with a usual name.

    Its type is binary, string (a path, a URI, base64 or ``data:``), or Hugging Face's ``struct<bytes, path>``.

    Raises:
        JobError: there is no such column (the message lists all columns), several have its name, or the file is not
            Parquet.
    """
    uri = uri_of(filesystem, path)
    names = IMAGE_COLUMNS if image_column is None else (image_column,)

    def read() -> str:
        with _opened(filesystem, path) as file:
            schema = file.schema_arrow
        name = _first(schema, names, _is_image_type, uri)
        if name is None:
            raise _no_image_column(uri, schema, names)
        return name

    return retried(read, uri)


def scan_parquet(
    filesystem: AbstractFileSystem, path: str, limit: int | None, *, image_column: str, names: dict[str, str]
) -> Scan:
    """List the rows of one Parquet file.

    The label column is ``label``, ``cls`` or ``labels``, or the only ClassLabel in Hugging Face's metadata; see
    `column_labels`. The key column is ``__key__``, ``key``, ``id`` or ``image_id``, else the path in the image column.
    If a row has no key, or the key is an inline image or longer than 1,024 bytes, the key is ``<file>:<row>``.

    Args:
        filesystem: of the file; picklable, because this runs as a task.
        path: of the file.
        limit: maximum number of rows.
        image_column: from `image_column_of`.
        names: path -> name of the file in keys.

    Returns:
        At most ``limit`` rows; ``offset`` is the row in the file.

    Raises:
        JobError: the file lacks the image column, several columns have its name or the label's, or it is not Parquet.
    """
    uri = uri_of(filesystem, path)

    def scan() -> Scan:
        tally = Tally()
        with _opened(filesystem, path) as file:
            columns = _columns_of(file.schema_arrow, image_column, uri)
            image_type = file.schema_arrow.field(columns.image).type
            key = columns.key
            if key is None and pa.types.is_struct(image_type):
                key = f"{columns.image}.path"
            elif key is None and _is_uri_type(image_type):
                key = columns.image
            if key is not None and _mean_bytes(file.metadata, key) > _LONGEST_KEY:
                key = None  # images as text: would read all bytes of the dataset for nothing
            wanted = [name for name in (columns.label, key) if name is not None]
            rows = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
            table = _read_rows(file, wanted, rows)
            candidates = file.metadata.num_rows
        keys = [f"{names[path]}:{row}" if key is None else key for row, key in enumerate(_keys(table, columns, rows))]
        nothing = pa.nulls(rows, pa.int64())
        references = pa.table([keys, [uri] * rows, range(rows), nothing, nothing], schema=REFERENCES)
        labels = no_labels(rows) if columns.label is None else _labels(table, columns, columns.label, uri, tally)
        return Scan(references, labels, tally.findings(), candidates)

    return retried(scan, uri)


@contextmanager
def _opened(filesystem: AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    with filesystem.open(path, "rb") as raw:
        try:
            yield pq.ParquetFile(raw)
        except pa.ArrowInvalid as error:
            raise JobError(
                f"Parquet {uri_of(filesystem, path)}: truncated, damaged, or not Parquet ({error}). Copy or create it "
                "again, or exclude it; nothing has been computed yet."
            ) from error


def _columns_of(schema: pa.Schema, image: str, uri: str) -> _Columns:
    if _first(schema, (image,), _is_image_type, uri) is None:
        raise _no_image_column(uri, schema, (image,))
    declared = _declared_names(schema)
    label = _first(schema, LABEL_COLUMNS, lambda kind: not pa.types.is_nested(kind), uri)
    label = label or _first(schema, LABEL_COLUMNS, lambda kind: True, uri)
    if label is None and len(declared) == 1:
        label = _first(schema, tuple(declared), pa.types.is_integer, uri)
    key = _first(schema, tuple(name for name in KEY_COLUMNS if name != image), _is_key_type, uri)
    return _Columns(image, label, key, declared.get(label or "", ()))


def _first(schema: pa.Schema, names: Sequence[str], accepts: Callable[[pa.DataType], bool], uri: str) -> str | None:
    """The first of ``names`` for which there is a column of an accepted type.

    Raises:
        JobError: several columns have that name.
    """
    for name in names:
        fields = [field for field in schema if field.name == name]
        if any(accepts(field.type) for field in fields):
            if len(fields) > 1:
                types = ", ".join(str(field.type) for field in fields)
                raise JobError(
                    f"Parquet {uri}: {len(fields)} columns are called {name!r} (of types {types}): expected one. "
                    "Rename or drop all but one; to use another image column, set --image-column."
                )
            return name
    return None


def _is_uri_type(kind: pa.DataType) -> bool:
    """Whether values of this type can be the path or URI of an image."""
    if pa.types.is_dictionary(kind):
        return _is_uri_type(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    is_binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return _is_uri_type(kind) or any(test(kind) for test in is_binary)


def _is_key_type(kind: pa.DataType) -> bool:
    return _is_uri_type(kind) or pa.types.is_integer(kind)


def _no_image_column(uri: str, schema: pa.Schema, names: Sequence[str]) -> JobError:
    there = ", ".join(f"{field.name}: {field.type}" for field in schema)
    return JobError(
        f"Parquet {uri}: no image column. Expected {' or '.join(map(repr, names))} of type binary, string or "
        f"struct<bytes, path>; got the columns {there}. Set image_column to the right one."
    )


def _declared_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Class names by column, from Hugging Face's ClassLabels (JSON in the schema's metadata)."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: tuple(str(name) for name in feature["names"])
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_rows(file: pq.ParquetFile, columns: list[str], rows: int) -> pa.Table:
    groups: list[int] = []
    total = 0
    while total < rows:
        total += file.metadata.row_group(len(groups)).num_rows
        groups.append(len(groups))
    # In this thread: see densefeat/storage/parquet.py.
    return file.read_row_groups(groups, columns=columns, use_threads=False).slice(0, rows)


def _mean_bytes(metadata: pq.FileMetaData, column: str) -> float:
    """Mean uncompressed bytes per row of a column."""
    chunks = [
        chunk
        for group in range(metadata.num_row_groups)
        for chunk in map(metadata.row_group(group).column, range(metadata.num_columns))
        if chunk.path_in_schema == column
    ]
    return float(sum(chunk.total_uncompressed_size for chunk in chunks) / max(1, metadata.num_rows))


def _keys(table: pa.Table, columns: _Columns, rows: int) -> list[str | None]:
    name = columns.image if columns.key is None else columns.key
    if name not in table.column_names:
        return [None] * rows
    values = table[name]
    if pa.types.is_struct(values.type):
        values = values.combine_chunks()
        index = values.type.get_field_index("path")
        if index < 0:
            return [None] * rows
        values = pc.struct_field(values, index)
    # Cast to bytes first, since strings may contain invalid UTF-8.
    return [None if key is None else _key(key) for key in values.cast(pa.string()).cast(pa.binary()).to_pylist()]


def _key(text: bytes) -> str | None:
    if not text or len(text) > _LONGEST_KEY:
        return None
    key = escaped(text.decode("utf-8", "surrogateescape"))
    return None if is_inline_image(key) else key


def _labels(table: pa.Table, columns: _Columns, label: str, uri: str, tally: Tally) -> Labels:
    labels = column_labels(table[label], label, uri, tally)
    has_names = columns.class_names and pa.types.is_integer(labels.values.type)
    return labels._replace(names=columns.class_names) if has_names else labels
