"""The index: one record per row of the store, in row order.

Written before the first shard with the references of the source; completed with the outcome of each row when all shards
are done.
"""

import pyarrow as pa

OK = "ok"
PENDING = "pending"  # its shard is not done
FAILED = (
    "unreadable", "corrupt", "unsupported", "too_large", "too_small", "nonfinite", "constant", "diverged", "crashed",
)  # fmt: skip

# Fields from the source: where the image is, and what is known before it is opened.
REFERENCE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),  # absolute: a plain path if local, else with its protocol
    pa.field("offset", pa.int64()),  # tar: byte offset of the member's data; Parquet: row in the file
    pa.field("nbytes", pa.int64()),  # size of the encoded image, if the listing reports it
    pa.field("label", pa.int64()),
)
REFERENCES = pa.schema(REFERENCE_FIELDS)

# Fields set when the shard is computed.
OUTCOME_FIELDS: tuple[pa.Field, ...] = (
    # OK, PENDING, one of FAILED; or retired, which a reader says of rows that are out of use (densefeat.rows.retired).
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("height", pa.int32()),  # of the original, as displayed (after EXIF rotation)
    pa.field("width", pa.int32()),
    # Row-major 2×3 map from original pixels (x, y, 1) to feature pixels (x, y), both with corners at integers:
    # pixel i covers [i, i + 1).
    pa.field("affine", pa.list_(pa.float64())),  # 6 values; pyarrow before 26 cannot read fixed-size lists with nulls
    pa.field("valid_box", pa.list_(pa.int32())),  # y0, x0, y1, x1 in feature pixels; outside it is padding
    pa.field("chunk_offset", pa.int64()),  # byte offset of the row's chunk in its shard object, for a range request
    pa.field("chunk_nbytes", pa.int64()),
)
OUTCOMES = pa.schema([pa.field("row", pa.int64(), nullable=False), *OUTCOME_FIELDS])

INDEX = pa.schema([pa.field("row", pa.int64(), nullable=False), *REFERENCE_FIELDS, *OUTCOME_FIELDS])


def pending_index(references: pa.Table) -> pa.Table:
    """The index before any shard is done: ``references`` with row numbers, and every outcome pending."""
    rows = references.num_rows
    outcomes = [
        pa.array([PENDING] * rows) if field.name == "status" else pa.nulls(rows, field.type) for field in OUTCOME_FIELDS
    ]
    return pa.table([pa.array(range(rows), pa.int64()), *references.columns, *outcomes], schema=INDEX)


def with_outcomes(index: pa.Table, outcomes: pa.Table) -> pa.Table:
    """Return ``index`` with the outcomes of all its rows, given in row order.

    Raises:
        ValueError: the row numbers of ``index`` and ``outcomes`` differ.
    """
    if not index["row"].equals(outcomes["row"]):
        raise ValueError(
            f"the index has {index.num_rows} rows and the ledger records {outcomes.num_rows}, or their order differs: "
            "run jobs/verify_store.py to see which shards are damaged"
        )
    columns = [index[name] for name in ("row", *REFERENCES.names)]
    return pa.table([*columns, *[outcomes[field.name] for field in OUTCOME_FIELDS]], schema=INDEX)
