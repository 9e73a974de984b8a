"""Compare a store with its ledger: the other end of the commit protocol in ``pipeline/store.py``."""

import hashlib
import threading
from collections.abc import Sequence

import pyarrow as pa

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.objects import Objects
from densefeat.store import FeatureStore
from pipeline.pca import Basis
from pipeline.shard import read_record, withdraw
from pipeline.store import reopen, step_sha256
from schemas.index import OK, OUTCOMES
from schemas.ledger import LedgerRecord


class StoreCheck:
    """Checks of one store.

    Attributes:
        recorded: shards that have a ledger record, in order.
        nbytes: read so far.

    Raises:
        StoreError: there is no store at ``uri``.
    """

    def __init__(self, uri: str) -> None:
        self._store = FeatureStore(uri)
        self._objects = Objects(uri)
        self.layout = self._store.layout
        keys = set(self._objects.list(layout.LEDGER))
        self.recorded = [shard for shard in range(self.layout.shards) if layout.ledger_key(shard) in keys]
        self.nbytes = 0
        self._lock = threading.Lock()

    def shard(self, shard: int) -> list[str]:
        """What is wrong with a shard's record or object; nothing if it is what was written, to the bit."""
        try:
            record = read_record(self._objects, layout.ledger_key(shard))
        except ValueError as error:
            return [f"its ledger record is damaged: {error}"]
        problems = []
        if record.configuration_hash != self._store.attributes["configuration_hash"]:
            problems.append(f"made with another configuration, {record.configuration_hash[:12]}…")
        if record.outcomes["row"].to_pylist() != list(self.layout.rows_of(shard)):
            problems.append("its record is about other rows")
        try:
            data = self._objects.get(layout.shard_key(shard))
        except FileNotFoundError:
            return [*problems, f"its object {layout.shard_key(shard)} is gone"]
        with self._lock:
            self.nbytes += len(data)
        return problems + self._object_problems(record, data)

    def _object_problems(self, record: LedgerRecord, data: bytes) -> list[str]:
        if len(data) != record.nbytes:
            return [f"its object has {len(data):,} bytes, {record.nbytes:,} were written"]
        if hashlib.sha256(data).hexdigest() != record.sha256:
            return [f"its object's bytes changed after they were written; rows {self._damaged_rows(record, data)}"]
        places = layout.unpack_shard_index(data, self.layout.shard_rows)
        for outcome, place in zip(record.outcomes.to_pylist(), places, strict=False):
            if place != (None if outcome["status"] != OK else (outcome["chunk_offset"], outcome["chunk_nbytes"])):
                return [f"row {outcome['row']} is {outcome['status']} in the record, and at {place} in the object"]
        return []

    def _damaged_rows(self, record: LedgerRecord, data: bytes) -> list[int]:
        """The rows whose chunk does not decode; none if only the shard's index is hit."""
        rows = []
        for outcome in record.outcomes.to_pylist():
            if outcome["status"] == OK:
                start = outcome["chunk_offset"]
                try:
                    layout.decode_chunk(data[start : start + outcome["chunk_nbytes"]], self.layout)
                except (ValueError, RuntimeError):
                    rows.append(outcome["row"])
        return rows

    def store(self) -> list[str]:
        """What is wrong with the store as a whole: basis, index, manifest."""
        problems = []
        try:
            if Basis.of_store(self._store).digest != self._store.attributes["configuration"]["pca"]["basis"]:
                problems.append("the PCA basis is not the one that the attributes name")
            if step_sha256(self._store.step) != self._store.attributes["step_sha256"]:
                problems.append("the quantization steps are not those that the attributes name")
        except StoreError as error:
            problems.append(str(error))
        index = self._store.index
        if index.num_rows != self.layout.rows:
            problems.append(f"the index has {index.num_rows} rows, the array {self.layout.rows}")
        elif self._objects.exists(layout.MANIFEST) and not problems:
            problems += self._index_problems(index)
        return problems

    def _index_problems(self, index: pa.Table) -> list[str]:
        """Compare the merged index of a finished store with the ledger."""
        for shard in self.recorded:
            try:
                outcomes = read_record(self._objects, layout.ledger_key(shard)).outcomes
            except ValueError:
                continue  # said for the shard
            rows = self.layout.rows_of(shard)
            if not index.select(OUTCOMES.names).slice(rows.start, len(rows)).equals(outcomes):
                return [f"the index does not say of rows {rows.start} … {rows[-1]} what the ledger recorded"]
        return []


def repair(objects: Objects, shards: Sequence[int]) -> None:
    """Delete damaged shards: their rows are pending, and a resumed job makes them anew."""
    for shard in shards:
        withdraw(objects, shard)
    reopen(objects)
