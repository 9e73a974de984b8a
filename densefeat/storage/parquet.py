"""Convert tables to and from the bytes of Parquet files."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["cell_content", "parquet_bytes", "read_parquet"]


def parquet_bytes(table: pa.Table) -> bytes:
    """Encode a table as a Parquet file. Pages have checksums: without them, a bit flip usually goes undetected."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Decode the table in a Parquet file, or those of its columns that are named here and there.

    Uses only the calling thread: ``pq.read_table`` starts threads that may still hold ``data`` when a short program
    ends, which then aborts with SIGABRT instead of its exit code (https://github.com/apache/arrow/issues/34314). On an
    index of 1.28 million rows this is not slower.

    Fixed-size lists, as in early stores, are converted to variable-size lists.

    Raises:
        ValueError: the bytes are not a Parquet file, are damaged, or have fixed-size lists that this pyarrow cannot
            read.
    """
    fixed = False
    try:
        with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True) as file:
            fixed = any(pa.types.is_fixed_size_list(field.type) for field in file.schema_arrow)
            table = file.read(None if columns is None else list(columns), use_threads=False)
        table.validate(full=True)  # checks among others that strings are UTF-8
    except (pa.ArrowException, OSError) as error:  # Arrow raises OSError for bytes that do not decompress
        if fixed and _pyarrow_major() < 26:
            raise ValueError(f"it has fixed-size lists, which require pyarrow 26 or newer: {error}") from error
        raise ValueError(f"not a complete Parquet file: {error}") from error
    return table.cast(_with_free_lists(table.schema)) if fixed else table


def cell_content(value: pa.Scalar) -> bytes | str | None:
    """Bytes or text of a cell; of a struct (Hugging Face's) its bytes, or its path if there are none; None if null.

    Text may contain invalid UTF-8, as surrogates.
    """
    if isinstance(value, pa.StructScalar):
        names = [field.name for field in value.type] if value.is_valid else []
        content = cell_content(value["bytes"]) if "bytes" in names else None
        return cell_content(value["path"]) if content is None and "path" in names else content
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    if not value.is_valid:
        return None
    data: bytes = value.as_buffer().to_pybytes()
    is_text = isinstance(value, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar)
    return data.decode("utf-8", "surrogateescape") if is_text else data


def _with_free_lists(schema: pa.Schema) -> pa.Schema:
    fields = [
        field.with_type(pa.list_(field.type.value_type)) if pa.types.is_fixed_size_list(field.type) else field
        for field in schema
    ]
    return pa.schema(fields, schema.metadata)


def _pyarrow_major() -> int:
    return int(pa.__version__.partition(".")[0])
