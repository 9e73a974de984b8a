"""Compare a store with its ledger: the reader's side of the commit protocol in ``pipeline/store/shard.py``."""

import hashlib
import threading
from contextlib import suppress
from functools import cached_property
from typing import Any

import pyarrow as pa

from densefeat import layout
from densefeat.conformance import report_problems
from densefeat.errors import StoreError
from densefeat.layout import step_sha256
from densefeat.rows.blocks import read_blocks
from densefeat.rows.index import read_index
from densefeat.rows.ledger import recorded_shards
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.storage.parquet import read_parquet
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.store.appending.grown_shard import decision
from pipeline.store.appending.growth import has_keys_of
from pipeline.store.fitted import stored_fit
from pipeline.store.shard import read_record
from schemas.attributes import StoreAttributes
from schemas.index import INDEX, OK, OUTCOMES
from schemas.ledger import LedgerRecord, manifest


class StoreCheck:
    """Checks of one store. Each check returns its problems, one message each.

    Args:
        uri: the store.
        fast: compare only the sizes of shard objects with the ledger, not their bytes.

    Attributes:
        layout: shape and sharding of the feature array.
        recorded: shards that have a ledger record, in order.
        growing: whether a job began to append rows, and did not complete it.
        partial: recorded shards, checked so far, that do not have the rows yet that were appended to them.
        nbytes: bytes of the shards checked so far.

    Raises:
        StoreError: there is no store at ``uri``.
    """

    def __init__(self, uri: str, *, fast: bool = False) -> None:
        self._fast = fast
        self._store = FeatureStore(uri)
        self._objects = Objects(uri)
        self.layout = self._store.layout
        self.recorded = recorded_shards(self._objects, self.layout)
        self.growing = self._objects.exists(layout.growth_key(self.layout.rows))
        self.partial: set[int] = set()
        self.nbytes = 0
        self._lock = threading.Lock()

    def shard(self, shard: int) -> list[str]:
        """Problems of a shard's record or object; none if the object is bit-identical to what was written.

        That a shard is `partial` is no problem; nor is an object that has the rows already which its record lacks.
        """
        try:
            record = read_record(self._objects, layout.ledger_key(shard))
        except ValueError as error:
            return [f"its ledger record is damaged: {error}"]
        except FileNotFoundError:
            return ["its ledger record is missing"]
        problems = []
        if record.shard != shard:
            problems.append(f"its record is that of shard {record.shard}")
        if record.configuration_hash != self._store.attributes["configuration_hash"]:
            problems.append(f"made with another configuration, {record.configuration_hash[:12]}…")
        rows = self.layout.rows_of(shard)
        if record.outcomes["row"].to_pylist() != list(rows[: record.rows]):
            problems.append("its record is that of other rows")
        decided = None
        if record.rows < len(rows):
            self.partial.add(shard)
            decided = self._decided(shard)
        for array, facts in record.objects.items():
            key = layout.shard_key(shard, array)
            try:
                data = None if self._fast else self._objects.get(key)
                size = self._sizes.get(key) if data is None else len(data)
            except FileNotFoundError:
                size = None
            if size is None:
                problems.append(f"its object {key} is missing")
                continue
            with self._lock:
                self.nbytes += size
            name = "its object" if array == layout.FEATURES else f"its object of the array {array}"
            if decided is not None and _is_described(size, data, decided.objects[array]):
                continue
            if size != facts["nbytes"]:
                problems.append(f"{name} has {size:,} bytes, {facts['nbytes']:,} were written")
            elif data is not None:
                problems += self._content_problems(record, array, name, data)
        return problems

    def _decided(self, shard: int) -> LedgerRecord | None:
        """The record that a shard will have, as a worker decided that then was killed; None if none did."""
        with suppress(ValueError):  # damaged, and computed again
            if (decided := decision(self._objects, shard, len(self.layout.rows_of(shard)))) is not None:
                return decided[0]
        return None

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Sizes of all shard objects by key."""
        arrays = (layout.FEATURES, *layout.COMPANIONS)
        if self._objects.can_list:
            return {key: size for array in arrays for key, size in self._objects.list(f"{array}/c").items()}
        keys = [layout.shard_key(shard, array) for shard in self.recorded for array in arrays]
        sizes = zip(keys, in_order(self._objects.size, keys), strict=True)
        return {key: size for key, size in sizes if size is not None}

    def _content_problems(self, record: LedgerRecord, array: str, name: str, data: bytes) -> list[str]:
        facts = record.objects[array]
        if not _is_described(len(data), data, facts):
            damaged = f"; damaged rows {self._damaged_rows(record, data)}" if array == layout.FEATURES else ""
            return [f"{name}'s bytes changed after they were written{damaged}"]
        return self._place_problems(record, data) if array == layout.FEATURES else []

    def _place_problems(self, record: LedgerRecord, data: bytes) -> list[str]:
        """Whether the record says where the chunks of the features are."""
        places = layout.unpack_shard_index(data, self.layout.shard_rows)
        for outcome, place in zip(record.outcomes.to_pylist(), places, strict=False):
            if place != (None if outcome["status"] != OK else (outcome["chunk_offset"], outcome["chunk_nbytes"])):
                return [f"row {outcome['row']} is {outcome['status']} in the record, and at {place} in the object"]
        return []

    def _damaged_rows(self, record: LedgerRecord, data: bytes) -> list[int]:
        """Rows whose chunk does not decode; none if only the shard's index is damaged."""
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
        """Problems of the store as a whole."""
        return self.attributes() + self.arrays() + self.tables() + self.retired() + self.reports()

    def attributes(self) -> list[str]:
        """Problems of the attributes: whether they can be read, and match their hash."""
        if isinstance(self._attributes, ValueError):
            return [f"the attributes are damaged: {self._attributes}"]
        if self._attributes.hash != self._store.attributes["configuration_hash"]:
            return ["the configuration does not match its hash"]
        return []

    @cached_property
    def _attributes(self) -> StoreAttributes | ValueError:
        """The attributes as `StoreAttributes`; or the error, if they are damaged, which only `attributes` reports."""
        try:
            return StoreAttributes.from_dict(self._store.attributes)
        except ValueError as error:
            return error

    def arrays(self) -> list[str]:
        """Problems of the basis, the steps and the arrays of a fitted upsampler."""
        problems = []
        named = None if isinstance(self._attributes, ValueError) else self._attributes
        try:
            basis = Basis.of_store(self._store).digest
            if named and basis != named.configuration.pca.basis:
                problems.append("the PCA basis does not match the attributes")
            step = step_sha256(self._store.step)
            if named and step != named.step_sha256:
                problems.append("the quantization steps do not match the attributes")
            if named:
                stored_fit(self._store, named.configuration)
        except (JobError, StoreError) as error:
            problems.append(str(error))
        return problems

    def retired(self) -> list[str]:
        """Whether the list of rows that are out of use can be read."""
        try:
            _ = self._store.retired
        except StoreError as error:
            return [str(error)]
        return []

    def reports(self) -> list[str]:
        """Problems of the reports of runs, on which nothing depends."""
        return report_problems(self._objects)

    def tables(self) -> list[str]:
        """Problems of index and manifest; `pipeline.store.repair.rebuild_tables` rebuilds both."""
        try:
            index = read_index(self._objects, self.layout, self._store.attributes["configuration_hash"])
        except StoreError as error:
            problems = [str(error)]
        else:
            problems = self._index_problems(index)
        return problems + self._manifest_problems() + self._block_problems()

    def _block_problems(self) -> list[str]:
        """Whether blocks of the ledger can be read, and hold the same as its records."""
        blocks = read_blocks(
            self._objects, self.layout, self.recorded, self._store.attributes["configuration_hash"], INDEX
        )
        problems = []
        if self._objects.can_list and (unused := len(self._objects.list(layout.LEDGER_BLOCKS)) - len(blocks)):
            problems.append(f"{unused} of the ledger's blocks are damaged, or of another configuration")
        for record in (record for block in blocks for record in LedgerRecord.of_block(block)):
            known = self._sound_records.get(record.shard)
            if known is not None and (record != known or not record.outcomes.equals(known.outcomes)):
                return [*problems, f"the ledger's blocks and its records differ in shard {record.shard}"]
        return problems

    def _index_problems(self, index: pa.Table) -> list[str]:
        named = None if isinstance(self._attributes, ValueError) else self._attributes
        if named and not has_keys_of(named, index):
            return ["the keys in the index do not match the attributes"]
        if not self._objects.exists(layout.MANIFEST):
            return []  # the reader merges the outcomes of the ledger into the index
        for shard, record in self._sound_records.items():
            rows = self.layout.rows_of(shard)
            if not index.select(OUTCOMES.names).slice(rows.start, len(rows)).equals(record.outcomes):
                return [f"the index and the ledger differ in rows {rows.start} … {rows[-1]}"]
        return []

    def _manifest_problems(self) -> list[str]:
        try:
            stored = read_parquet(self._objects.get(layout.MANIFEST)).to_pylist()
        except FileNotFoundError:
            return []
        except ValueError as error:
            return [f"{layout.MANIFEST} is damaged: {error}"]
        by_shard = {row.get("shard"): row for row in stored}
        for row in manifest(list(self._sound_records.values())).to_pylist():
            if by_shard.get(row["shard"]) != row:
                return [f"{layout.MANIFEST} and the ledger differ in shard {row['shard']}"]
        return []

    @cached_property
    def _sound_records(self) -> dict[int, LedgerRecord]:
        """Records that can be read, by shard; `shard` reports the others."""

        def read(shard: int) -> LedgerRecord | None:
            try:
                return read_record(self._objects, layout.ledger_key(shard))
            except (FileNotFoundError, ValueError):
                return None

        records = zip(self.recorded, in_order(read, self.recorded), strict=True)
        return {shard: record for shard, record in records if record is not None}


def _is_described(size: int, data: bytes | None, facts: dict[str, Any]) -> bool:
    """Whether an object is the one that facts describe; without its bytes, whether it has the size."""
    return bool(size == facts["nbytes"] and (data is None or hashlib.sha256(data).hexdigest() == facts["sha256"]))
