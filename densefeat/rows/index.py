"""The index of a store: one record per row, completed from the ledger while the store is unfinished; and its rows."""

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.align import RECORDED, RowGeometry
from densefeat.arguments import is_text, whole_number
from densefeat.errors import MissingFeatures, StoreError
from densefeat.layout import FeatureLayout
from densefeat.rows.blocks import read_blocks
from densefeat.rows.ledger import OUTCOME, check_columns, pending, read_record, recorded_shards, with_outcomes
from densefeat.rows.retired import RETIRED, Retired, read_retired, with_retired
from densefeat.storage.metadata import read_layout, read_root
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.storage.parquet import read_parquet

__all__ = ["IndexedRows", "read_index", "stored_index"]

Rows = slice | Iterable[int | str]

logger = logging.getLogger(__name__)

_SHOWN = 10
_KEYS_IN_A_DICT, _SCANS_BEFORE_A_DICT = 50_000, 50  # the dict of a million keys costs as much as some tens of scans
# Columns of the index that this package reads. schemas/index.py has the whole schema.
_COLUMNS = {"key": pa.string(), "label": pa.int64(), "affine": pa.list_(pa.float64()), **OUTCOME}
# What is decoded at first, and for geometry; each costs less than half of the time and memory of all.
_LOOKUP = ("row", "key", "label", "status", "error", "chunk_offset", "chunk_nbytes")
_GEOMETRY = ("row", *RECORDED)

REPAIR = "verify the store with jobs/verify_store.py --repair and compute the lost rows again with --resume"
_REBUILD = "jobs/verify_store.py --repair rebuilds it from the images and the ledger"


def read_index(
    objects: Objects, features: FeatureLayout, configuration_hash: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the index with the outcomes of all finished shards; rows of the others are pending.

    Args:
        objects: the store.
        features: its layout.
        configuration_hash: of its ledger records.
        columns: of a finished store, to read only these; None: all.

    Raises:
        StoreError: the index is missing or damaged, or the storage does not reveal which shards are done.
    """
    try:
        # The order matters: a job that finishes in between merges the index before it writes the manifest.
        finished = objects.exists(layout.MANIFEST)
        index = stored_index(objects, features, columns if finished else None)
        return index if finished else _with_finished_shards(index, objects, features, configuration_hash)
    except PermissionError as error:
        if objects.can_list:
            raise
        raise StoreError(
            f"{objects.uri}: cannot tell which shards are done: {error}. An unfinished store needs a server that "
            "answers 404 for missing objects: open it with the protocol of its storage (s3://, gs://), or finish it"
        ) from error


def stored_index(
    objects: Objects, features: FeatureLayout | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the index as stored, without the ledger.

    Args:
        objects: the store.
        features: its layout, if the index is to have as many rows. Rows that were appended since are left out.
        columns: to read, ``row`` among them; None: all.

    Raises:
        StoreError: the index is missing or damaged; in other columns, damage is not found.
    """
    try:
        index = read_parquet(objects.get(layout.INDEX), columns)
        check_columns(index, {name: kind for name, kind in _COLUMNS.items() if columns is None or name in columns})
        if features is not None and index.num_rows != features.rows:
            if index.num_rows < features.rows or not _has_grown(objects, features):
                raise ValueError(f"it has {index.num_rows} rows, the features have {features.rows}")
            index = index.slice(0, features.rows)
        if not np.array_equal(index["row"].to_numpy(), np.arange(index.num_rows)):
            raise ValueError("its rows are not numbered from 0")
    except FileNotFoundError:
        raise StoreError(f"{objects.uri}: {layout.INDEX} is missing; {_REBUILD}") from None
    except ValueError as error:
        raise StoreError(f"{objects.uri}: {layout.INDEX} is damaged: {error}; {_REBUILD}") from error
    return index


def _has_grown(objects: Objects, features: FeatureLayout) -> bool:
    """Whether rows were appended to a store since its layout was read, or are being appended now."""
    growing = objects.exists(layout.growth_key(features.rows))
    return growing or read_layout(objects, read_root(objects)).rows > features.rows


def _with_finished_shards(
    index: pa.Table, objects: Objects, features: FeatureLayout, configuration_hash: str
) -> pa.Table:
    """Complete the index of an unfinished store from the ledger; rows of a damaged record are pending."""
    recorded = recorded_shards(objects, features)
    blocks = read_blocks(objects, features, recorded, configuration_hash, index.schema)
    in_blocks = {facts["shard"] for block in blocks for facts in block.facts}

    def outcomes(shard: int) -> pa.Table | None:
        try:
            return read_record(objects, features, index.schema, shard)
        except FileNotFoundError:  # deleted by a job since it was listed
            return None
        except ValueError as error:
            logger.warning(
                "%s: the ledger record %s is damaged: %s; its rows count as pending, and --resume computes them again",
                objects.uri, layout.ledger_key(shard), error,
            )  # fmt: skip
            return None

    found = in_order(outcomes, [shard for shard in recorded if shard not in in_blocks])
    single = [record for record in found if record is not None]
    return with_outcomes(pending(index), [block.outcomes for block in blocks] + single)


class IndexedRows:
    """The rows of a store as its index describes them: keys, labels, outcomes, geometry. Base of ``FeatureStore``."""

    uri: str
    attributes: dict[str, Any]
    layout: FeatureLayout
    shape: tuple[int, int, int]
    _objects: Objects
    _scans = 0  # of the keys

    def __len__(self) -> int:
        """Number of rows, including failed ones."""
        return self.layout.rows

    def __contains__(self, key: object) -> bool:
        """Whether a row has this key."""
        return isinstance(key, str) and self._row_with_key(key) is not None

    def __getstate__(self) -> dict[str, Any]:
        # The index can be large: every process reads it again instead of receiving a copy.
        dropped = ("index", "lookup", "_geometries", "labels", "rows_with_features", "_row_of_key", "_places")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    @cached_property
    def index(self) -> pa.Table:
        """One record per row: key, uri, label, status, error, original size, affine map, valid box (schemas/index.py).

        In an unfinished store, rows of unfinished shards are pending. A damaged record is logged, and its rows are
        pending. Rows that were out of use when the store was opened have the status retired.

        Raises:
            StoreError: the index, or the list of retired rows, is missing or damaged.
        """
        return self.in_use(read_index(self._objects, self.layout, self.attributes["configuration_hash"]))

    @cached_property
    def lookup(self) -> pa.Table:
        """Columns of the index that reading needs: row, key, label, status, error and place of the chunk.

        Of a finished store, no other columns are decoded for it.

        Raises:
            StoreError: as `index`.
        """
        return self._columns(_LOOKUP)

    @cached_property
    def _geometries(self) -> pa.Table:
        return self._columns(_GEOMETRY)

    def _columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of `index`."""
        if "index" not in self.__dict__:
            columns = read_index(self._objects, self.layout, self.attributes["configuration_hash"], names)
            if columns.num_columns <= len(names):
                return self.in_use(columns) if "status" in names else columns
            # All columns of an unfinished store: the only look at its ledger, which changes.
            self.index = self.in_use(columns)
        return self.index.select(names)

    def in_use(self, index: pa.Table) -> pa.Table:
        """The index with the status of rows that are retired.

        Raises:
            StoreError: the list of retired rows is missing or damaged.
        """
        return with_retired(index, self.retired)

    @cached_property
    def retired(self) -> pa.Table:
        """The rows that were out of use when the store was opened, ascending: row, reason, since (UTC).

        Raises:
            StoreError: the list is missing or damaged.
        """
        return read_retired(self._objects, Retired.of(self.uri, self.attributes))

    @property
    def keys(self) -> list[str]:
        """Key of every row."""
        keys: list[str] = self.lookup["key"].to_pylist()
        return keys

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """[len] int64: label of every row, −1 where it is unknown. Read-only."""
        return _read_only(self.lookup["label"].fill_null(-1).to_numpy())

    def label(self, row_or_key: int | str) -> int | None:
        """Label of a row; None if it is unknown.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
        """
        label: int | None = self.lookup["label"][self.row_of(row_or_key)].as_py()
        return label

    @cached_property
    def rows_with_features(self) -> npt.NDArray[np.int64]:
        """[n] int64, ascending: the rows that did not fail, and are neither pending nor retired. Read-only."""
        return _read_only(np.flatnonzero(self.lookup["chunk_offset"].is_valid().to_numpy()))

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, key in enumerate(self.keys):
            rows[key] = -1 if key in rows else row  # -1: ambiguous
        return rows

    def _row_with_key(self, key: str) -> int | None:
        """The row with a key; −1 if several rows have it, None if there is none.

        A scan takes milliseconds for a million keys, their dict seconds: it is made when it has become worth it.
        """
        self._scans += 1
        if len(self) <= _KEYS_IN_A_DICT or self._scans > _SCANS_BEFORE_A_DICT or "_row_of_key" in self.__dict__:
            return self._row_of_key.get(key)
        found = np.flatnonzero(pc.equal(self.lookup["key"], key).to_numpy()) if is_text(key) else np.empty(0, np.int64)
        return None if len(found) == 0 else int(found[0]) if len(found) == 1 else -1

    @cached_property
    def _places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        offset, nbytes = (self.lookup[name].fill_null(-1).to_numpy() for name in ("chunk_offset", "chunk_nbytes"))
        return offset, nbytes

    def row_of(self, row_or_key: int | str) -> int:
        """Row number, 0 … len − 1, of a key (``str``) or of a row, which may be negative to count from the end.

        Raises:
            KeyError: no such key, or several rows have it.
            IndexError: no such row.
            TypeError: neither a string nor a Python, NumPy or torch integer.
        """
        if isinstance(row_or_key, str):
            row = self._row_with_key(row_or_key)
            if row is None:
                raise KeyError(f"no row has the key {row_or_key!r}; keys look like {self.lookup['key'][0].as_py()!r}")
            if row < 0:
                raise KeyError(f"several rows have the key {row_or_key!r}: use a row number")
            return row
        row = whole_number(row_or_key, "a row that is not a key")
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} rows")
        return row % len(self)

    def checked_rows(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Row numbers [n] int64 of rows or keys, all of which have features.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
            MissingFeatures: rows have no features; its attribute ``rows`` has their numbers.
            StoreError: the index is damaged.
        """
        numbers = self._rows_of(rows)
        if absent := self._without_features(numbers):
            raise self._missing(*absent)
        return np.array(numbers, dtype=np.int64)

    def _rows_of(self, rows: Rows) -> list[int]:
        if isinstance(rows, str | bytes):
            raise TypeError(f"rows must be several rows or keys: got {rows!r}; pass a list of one")
        if isinstance(rows, slice):
            return list(range(len(self))[rows])
        return [self.row_of(row) for row in rows]

    def geometry(self, row_or_key: int | str) -> RowGeometry:
        """Where a row's features lie in its original image.

        Raises:
            KeyError, IndexError, TypeError: as `row_of`.
            MissingFeatures: the row failed or is retired, or its shard is not done.
            StoreError: the index is damaged.
        """
        row = self.row_of(row_or_key)
        if self._places[0][row] < 0:
            raise self._missing(row)
        try:
            record = {name: self._geometries[name][row].as_py() for name in RECORDED}
            return RowGeometry.from_record(record, self.shape[1:])
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.uri}: {layout.INDEX} is damaged: row {row}: {error}; {REPAIR}") from error

    def _without_features(self, rows: list[int]) -> list[int]:
        """Those of ``rows`` that failed, are retired or pending.

        Raises:
            StoreError: a row has no chunk, and the index does not say why.
        """
        offsets, statuses = self._places[0], self.lookup["status"]
        absent = [row for row in rows if offsets[row] < 0]
        for row in absent:
            if statuses[row].as_py() == "ok":
                raise self._no_chunk(row)
        return absent

    def _missing(self, row: int, *others: int) -> MissingFeatures | StoreError:
        """The error for rows that cannot be read; it explains the first."""
        key, status, error = (self.lookup[name][row].as_py() for name in ("key", "status", "error"))
        if status == "ok":
            return self._no_chunk(row)
        reason = f"row {row} ({key}) has no features: {status}: {error}"
        if status == "pending":
            reason = f"row {row} ({key}): its shard is not done yet; resume the job to compute it"
        elif status == RETIRED:
            reason = f"row {row} ({key}) is retired: {error}"
        if not others:
            return MissingFeatures(row, status, reason)
        rows = (row, *others)
        shown = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        advice = "leave them out (rows_with_features lists the others, read() has missing=)"
        return MissingFeatures(row, status, f"{len(rows)} rows have no features: {shown}; {advice}. {reason}", rows)

    def _no_chunk(self, row: int) -> StoreError:
        return StoreError(f"{self.uri}: {layout.INDEX} is damaged: row {row} is ok but has no chunk; {REPAIR}")


def _read_only(array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    array.flags.writeable = False
    return array
