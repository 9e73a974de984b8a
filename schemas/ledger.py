"""The ledger: one record per finished shard, written after its object. A shard without a record is not done.

A record is a small Parquet file: a table with the outcome of each row (``schemas.index.OUTCOMES``), and facts about the
whole shard in the file's metadata. All records together form the manifest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from densefeat.layout import FEATURES
from densefeat.rows.blocks import LedgerBlock
from densefeat.storage.parquet import parquet_bytes, read_parquet
from schemas.index import OK, OUTCOMES

_METADATA_KEY = b"densefeat"

MANIFEST = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("rows_ok", pa.int64(), nullable=False),
        pa.field("rows_failed", pa.int64(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("configuration_hash", pa.string(), nullable=False),
        pa.field("clipped", pa.int64(), nullable=False),
        pa.field("seconds", pa.map_(pa.string(), pa.float64())),
        pa.field("made_by", pa.map_(pa.string(), pa.string())),
    ]
)
# Only in the manifests of stores that have such arrays.
_COMPANIONS = pa.field("companions", pa.map_(pa.string(), pa.struct([("nbytes", pa.int64()), ("sha256", pa.string())])))


@dataclass(frozen=True)
class LedgerRecord:
    """One finished shard.

    Attributes:
        shard: its number.
        rows_ok: rows with features.
        rows_failed: rows without features, each with its error in ``outcomes``.
        nbytes: size of the shard object.
        sha256: hex digest of the shard object.
        configuration_hash: hash of the configuration the shard was computed with.
        clipped: number of values outside the int8 range (always 0 for float16).
        seconds: busy time by stage; stages overlap, so the sum exceeds the wall time.
        made_by: host, device, batch size and versions, which may differ between shards of one store.
        outcomes: table of ``schemas.index.OUTCOMES``, one record per row.
        companions: array -> ``nbytes`` and ``sha256`` of its object, for each array that is written with the features.
    """

    shard: int
    rows_ok: int
    rows_failed: int
    nbytes: int
    sha256: str
    configuration_hash: str
    clipped: int
    seconds: dict[str, float]
    made_by: dict[str, str]
    outcomes: pa.Table = field(compare=False)
    companions: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.rows_ok + self.rows_failed

    @property
    def objects(self) -> dict[str, dict[str, Any]]:
        """Size and digest of all objects of the shard: array -> ``nbytes`` and ``sha256``; the features come last."""
        return {**self.companions, FEATURES: {"nbytes": self.nbytes, "sha256": self.sha256}}

    @property
    def total_nbytes(self) -> int:
        """Size of all objects of the shard."""
        return sum(facts["nbytes"] for facts in self.objects.values())

    def facts(self) -> dict[str, Any]:
        """All fields except the outcomes, JSON-serializable; a row of the manifest."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "outcomes" and not (name == "companions" and not value)
        }

    def to_bytes(self) -> bytes:
        """Encode the record as a Parquet file."""
        table = self.outcomes.replace_schema_metadata({_METADATA_KEY: json.dumps(self.facts())})
        return parquet_bytes(table)

    @classmethod
    def of_block(cls, block: LedgerBlock) -> "list[LedgerRecord]":
        """The records in a block.

        Raises:
            ValueError: they are not ledger records.
        """
        try:
            outcomes = block.outcomes.cast(OUTCOMES)
            return [cls(**facts, outcomes=table) for facts, table in LedgerBlock(block.facts, outcomes).records()]
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(f"not ledger records: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "LedgerRecord":
        """Decode a record.

        Raises:
            ValueError: the bytes are not a ledger record.
        """
        try:
            table = read_parquet(data)
            facts = json.loads(table.schema.metadata[_METADATA_KEY])
            return cls(**facts, outcomes=table.replace_schema_metadata(None).cast(OUTCOMES))
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a ledger record: {error}") from error


@dataclass
class RowOutcome:
    """The outcome of one row, a record of ``schemas.index.OUTCOMES``."""

    row: int
    status: str
    error: str | None = None
    height: int | None = None
    width: int | None = None
    affine: tuple[float, ...] | None = None
    valid_box: tuple[int, ...] | None = None
    chunk_offset: int | None = None
    chunk_nbytes: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the row has features."""
        return self.status == OK


def outcomes_table(outcomes: Sequence[RowOutcome]) -> pa.Table:
    """Convert outcomes to a table of ``schemas.index.OUTCOMES``."""
    return pa.Table.from_pylist([outcome.__dict__ for outcome in outcomes], schema=OUTCOMES)


def manifest(records: Sequence[LedgerRecord]) -> pa.Table:
    """Convert records to the manifest: one row per shard, in shard order."""
    rows, schema = [], MANIFEST
    for record in sorted(records, key=lambda record: record.shard):
        facts = record.facts()
        for name in ("seconds", "made_by", "companions"):
            if name in facts:
                facts[name] = list(facts[name].items())
        rows.append(facts)
    if any("companions" in row for row in rows):
        schema = MANIFEST.append(_COMPANIONS)
    return pa.Table.from_pylist(rows, schema=schema)
