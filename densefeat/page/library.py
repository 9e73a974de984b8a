"""The store that the page shows, followed while it is being made."""

import copy
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.errors import DensefeatError, StoreError
from densefeat.page.cache import ByteCache
from densefeat.page.features import Features
from densefeat.page.figures import ShardSums, manifest_figures, store_figures
from densefeat.page.listing import counts, matching_rows, rows_with_text
from densefeat.page.sample import Sample
from densefeat.rows.blocks import read_blocks
from densefeat.rows.index import stored_index
from densefeat.rows.ledger import pending, read_record, recorded_shards, with_outcomes
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import PARALLEL_REQUESTS
from densefeat.store import FeatureStore

__all__ = ["Ledger", "Library", "Shown"]

logger = logging.getLogger(__name__)

_FILTERS_BYTES = 64 << 20
_FIRST_S, _LATER_S = 2.0, 5.0  # a store with 20,000 finished shards is shown before all of their records are read
_FACTS = ("rows_ok", "clipped", "seconds", "made_by")


class Ledger:
    """The shards of an unfinished store that are done, each of whose records is read once.

    Args:
        objects: the store.
        features: its layout.
        configuration_hash: of its configuration.

    Attributes:
        index: one record per row, as ``FeatureStore.index``.
        sums: over the shards.
        unread: number of records that `read_on` has not read yet.

    Raises:
        StoreError, OSError: the index is missing or damaged, or the storage failed.
    """

    def __init__(self, objects: Objects, features: layout.FeatureLayout, configuration_hash: str) -> None:
        self._objects, self._features, self._hash = objects, features, configuration_hash
        self._shards: frozenset[int] = frozenset()
        self._damaged: dict[int, str] = {}
        self.sums = ShardSums()
        self.unread = 0
        self.index = pending(stored_index(objects, features))

    def read_on(self, budget_s: float) -> "Ledger":
        """The ledger as it is now: this one, or a new one if shards were finished, or dropped by a repair.

        Args:
            budget_s: seconds to read records for; there are then `unread` ones left.

        Raises:
            StoreError, OSError: as the class.
        """
        try:
            recorded = recorded_shards(self._objects, self._features)
        except PermissionError as error:
            if self._objects.can_list:
                raise
            raise StoreError(f"{self._objects.uri}: cannot tell which shards are done: {error}") from error
        if not self._shards <= set(recorded):
            return Ledger(self._objects, self._features, self._hash).read_on(budget_s)
        end = time.monotonic() + budget_s
        unread = [shard for shard in recorded if shard not in self._shards]
        found = self._in_blocks(unread)
        unread = [shard for shard in unread if shard not in found]
        # From a local disk it is Arrow that takes the time, and more threads would only keep requests waiting.
        with ThreadPoolExecutor(PARALLEL_REQUESTS if self._objects.local_path is None else 1) as pool:
            while unread:
                part, unread = unread[:PARALLEL_REQUESTS], unread[PARALLEL_REQUESTS:]
                found |= {shard: one for shard, one in zip(part, pool.map(self._record, part), strict=True) if one}
                if time.monotonic() > end:
                    break
        return self._with(found, len(unread)) if found or len(unread) != self.unread else self

    def _with(self, records: dict[int, tuple[dict[str, Any], pa.Table]], unread: int) -> "Ledger":
        found = copy.copy(self)
        found.unread = unread
        if not records:  # the rest is damaged
            return found
        # A shard to which rows are being appended is read again.
        done = {s for s, (_, outcomes) in records.items() if len(outcomes) == len(self._features.rows_of(s))}
        found._shards = self._shards | done
        found.sums = copy.deepcopy(self.sums)
        for shard in done:
            found.sums.add(records[shard][0])
        found.index = with_outcomes(self.index, [outcomes for _, outcomes in records.values()])
        return found

    def _in_blocks(self, shards: list[int]) -> dict[int, tuple[dict[str, Any], pa.Table]]:
        """Facts and outcomes of those shards that are in blocks of the ledger."""
        if len(shards) <= PARALLEL_REQUESTS:
            return {}
        blocks = read_blocks(self._objects, self._features, shards, self._hash, self.index.schema)
        return {facts["shard"]: (facts, outcomes) for block in blocks for facts, outcomes in block.records()}

    def _record(self, shard: int) -> tuple[dict[str, Any], pa.Table] | None:
        """Facts and outcomes in the record of a shard; None if it is damaged or gone, so that its rows are pending."""
        key = layout.ledger_key(shard)
        try:
            outcomes = read_record(self._objects, self._features, self.index.schema, shard)
            facts = json.loads((outcomes.schema.metadata or {})[layout.ATTRIBUTES_KEY.encode()])
            return {name: facts[name] for name in _FACTS}, outcomes
        except FileNotFoundError:  # deleted by a job since it was listed
            return None
        except (ValueError, KeyError, TypeError) as error:
            if self._damaged.get(shard) != str(error):
                self._damaged[shard] = str(error)
                logger.warning("the ledger record %s is damaged: %s; its rows count as pending", key, error)
            return None


class Shown:
    """A store as it was when it was opened, and what is kept of it.

    Args:
        store: the store.
        objects: its objects.
        ledger: of an unfinished store; None: the store is finished.
        before: the same store when it was opened last; what has been read then is kept.
    """

    def __init__(
        self, store: FeatureStore, objects: Objects, ledger: Ledger | None, before: "Shown | None" = None
    ) -> None:
        self.store, self.objects, self.ledger = store, objects, ledger
        self.finished = ledger is None
        self.class_names = list(store.class_names)
        self.counts = counts(store.index, self.class_names)
        self.features: Features = Features(store, before.features if before else None)
        self.sample: Sample = Sample(self.features, before=before.sample if before and ledger else None)
        self._lower_keys: pa.ChunkedArray = before._lower_keys if before else pc.utf8_lower(store.index["key"])
        self._filtered: ByteCache[npt.NDArray[Any]] = ByteCache(_FILTERS_BYTES, lambda rows: rows.nbytes)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The store in figures."""
        shards = manifest_figures(self.objects) if self.ledger is None else self.ledger.sums.figures()
        return {**store_figures(self.store), **shards}

    def rows(self, text: str, status: str, label: int | None) -> npt.NDArray[Any]:
        """Rows whose key contains ``text``, with this status and label; see `densefeat.page.listing.matching_rows`."""

        def make() -> npt.NDArray[Any]:
            with_text = self.rows(text, "", None) if text and (status or label is not None) else None
            if text and with_text is None:
                return rows_with_text(self._lower_keys, text)
            return matching_rows(self.store.index, with_text, status=status, label=label)

        return self._filtered.get((text, status, label), make)


class Library:
    """Opens the store, and looks every ``refresh_s`` seconds for shards finished since, until the store is finished.

    A thread of its own looks when the page is used, so that no request waits.

    Raises:
        StoreError, OSError: as for ``densefeat.FeatureStore``.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None, *, refresh_s: float = 10.0) -> None:
        self._uri, self._options, self._refresh_s = uri, storage_options, refresh_s
        self._objects = Objects(uri, storage_options)
        self._lock = threading.Lock()
        self._looking = False
        self._shown = self._opened(None)
        self._looked = time.monotonic()
        self.generation = 0  # stores at this place so far, less one
        self.problem: str | None = None  # why the store could not be read when it was looked at last

    def shown(self) -> Shown:
        """The store as it was when it was looked at last."""
        with self._lock:
            ledger = self._shown.ledger
            due = ledger is not None and (ledger.unread > 0 or time.monotonic() - self._looked >= self._refresh_s)
            if due and not self._looking:
                self._looking = True
                threading.Thread(target=self._look, name="densefeat-page-library", daemon=True).start()
            return self._shown

    def _look(self) -> None:
        before, problem = self._shown, None
        try:
            shown = self._opened(before)
        except (DensefeatError, OSError) as error:
            logger.warning("the store cannot be read: %s", error)
            shown, problem = before, str(error)
        except Exception:
            logger.exception("the store cannot be read")
            shown, problem = before, "internal error; see the messages of the command"
        with self._lock:
            self.generation += not _is_same(shown.store, before.store)
            self._shown, self.problem, self._looking = shown, problem, False
            self._looked = time.monotonic()

    def _opened(self, before: Shown | None) -> Shown:
        """The store as it is now; ``before`` itself if nothing has changed."""
        finished = self._objects.exists(layout.MANIFEST)  # before the index: it may be finished in between
        store = FeatureStore(self._uri, self._options)
        if before is not None and not _is_same(store, before.store):
            before = None
        if finished:
            return Shown(store, self._objects, None, before)
        if before is not None and before.ledger is not None:
            ledger = before.ledger.read_on(_LATER_S)
            if ledger is before.ledger:
                return before
        else:
            ledger = Ledger(self._objects, store.layout, store.attributes["configuration_hash"]).read_on(_FIRST_S)
        store.index = store.in_use(ledger.index)
        return Shown(store, self._objects, ledger, before)


def _is_same(one: FeatureStore, other: FeatureStore) -> bool:
    return one.attributes == other.attributes and one.layout == other.layout
