"""Tables as the bytes of Parquet files."""

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["parquet_bytes", "read_parquet"]


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as a Parquet file. Its pages have checksums: without them, a flipped bit mostly is another value."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def read_parquet(data: bytes) -> pa.Table:
    """The table in a Parquet file.

    In this thread only: ``pq.read_table`` starts threads that may still hold ``data`` when a short program ends, which
    then dies of SIGABRT instead of exiting with its code (https://github.com/apache/arrow/issues/34314). It is not
    slower for it on an index of 1.28 million rows.

    Lists of fixed size, which early stores have, become lists of any size, as in all others.

    Raises:
        ValueError: it is not one, or damaged, or early, and this pyarrow cannot read it.
    """
    fixed = False
    try:
        with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True) as file:
            fixed = any(pa.types.is_fixed_size_list(field.type) for field in file.schema_arrow)
            table = file.read(use_threads=False)
        table.validate(full=True)  # texts are UTF-8
    except (pa.ArrowException, OSError) as error:  # Arrow raises OSError for bytes that do not decompress
        if fixed and _pyarrow_major() < 26:
            raise ValueError(f"it has lists of fixed size, which take pyarrow 26 or newer to read: {error}") from error
        raise ValueError(f"not a whole Parquet file: {error}") from error
    return table.cast(_with_free_lists(table.schema)) if fixed else table


def _with_free_lists(schema: pa.Schema) -> pa.Schema:
    fields = [
        field.with_type(pa.list_(field.type.value_type)) if pa.types.is_fixed_size_list(field.type) else field
        for field in schema
    ]
    return pa.schema(fields, schema.metadata)


def _pyarrow_major() -> int:
    return int(pa.__version__.partition(".")[0])
