"""The store in figures: variance, bytes, seconds, failures, configuration."""

import json
import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from densefeat import layout
from densefeat.index import recorded_shards
from densefeat.page.listing import without_features
from densefeat.parquet import read_parquet
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore

__all__ = ["RecordedShards", "manifest_figures", "store_figures"]

logger = logging.getLogger(__name__)

_FAILURES = 50
_PARALLEL_REQUESTS = 32


def store_figures(store: FeatureStore) -> dict[str, Any]:
    """All figures but those of the shards, JSON-serializable.

    Raises:
        StoreError, OSError: the store is damaged, or its storage failed.
    """
    nbytes = store.index["chunk_nbytes"].drop_null()
    return {
        "explained_variance_ratio": store.array("pca/explained_variance_ratio").tolist(),
        "explained_variance": store.attributes.get("explained_variance"),
        "images": len(nbytes),
        "bytes": pc.sum(nbytes).as_py() or 0,
        "uncompressed_bytes_per_image": store.layout.image_nbytes,
        "sizes": _histogram(nbytes.to_numpy()),
        "failures": [one for one in without_features(store.index) if one["status"] != "pending"][:_FAILURES],
        "configuration": store.attributes["configuration"],
        "configuration_hash": store.attributes["configuration_hash"],
        "versions": store.attributes.get("versions", {}),
    }


def manifest_figures(objects: Objects) -> dict[str, Any]:
    """Figures of the shards of a finished store; see `RecordedShards.figures`.

    Raises:
        ValueError, OSError: the manifest is damaged, or the storage failed.
    """
    manifest = read_parquet(objects.get(layout.MANIFEST))
    sums = _Sums()
    for record in manifest.select(["rows_ok", "clipped", "seconds", "made_by"]).to_pylist():
        sums.add({**record, "seconds": dict(record["seconds"] or []), "made_by": dict(record["made_by"] or [])})
    return sums.figures(0)


class RecordedShards:
    """Figures of the shards of an unfinished store, from the ledger. Reads each record once. Thread-safe.

    Args:
        objects: the store.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._read: set[int] = set()
        self._sums = _Sums()

    def figures(self, features: layout.FeatureLayout, budget_s: float = 0.2) -> dict[str, Any]:
        """Sums over the shards whose records have been read; unread ones are read for ``budget_s`` seconds.

        Returns:
            ``seconds`` by stage (the longest first; None before the first shard), ``timed_images`` (with features, in
            these shards), ``shards``, ``unread_shards``, shards by ``devices``, ``clipped`` values. Damaged records
            are left out.

        Raises:
            OSError: the storage failed.
        """
        with self._lock:
            recorded = recorded_shards(self._objects, features)
            if not self._read <= set(recorded):  # a repair has dropped records
                self._read, self._sums = set(), _Sums()
            unread = [shard for shard in recorded if shard not in self._read]
            end = time.monotonic() + budget_s
            with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
                while unread:
                    shards, unread = unread[:_PARALLEL_REQUESTS], unread[_PARALLEL_REQUESTS:]
                    for shard, facts in zip(shards, pool.map(self._facts, shards), strict=True):
                        if facts is not None:
                            self._sums.add(facts)
                            self._read.add(shard)
                    if time.monotonic() > end:
                        break
            return self._sums.figures(len(unread))

    def _facts(self, shard: int) -> dict[str, Any] | None:
        try:
            data = self._objects.get(layout.ledger_key(shard))
            metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
            facts = json.loads(metadata[layout.ATTRIBUTES_KEY.encode()])
            return {name: facts[name] for name in ("rows_ok", "clipped", "seconds", "made_by")}
        except FileNotFoundError:  # deleted by a job since it was listed
            return None
        except (ValueError, KeyError) as error:
            logger.warning("%s: the ledger record of shard %d is damaged: %s", self._objects.uri, shard, error)
            return None


class _Sums:
    """Sums over the records of shards."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._devices: Counter[str] = Counter()
        self._shards = self._images = self._clipped = 0

    def add(self, facts: dict[str, Any]) -> None:
        """Add a record."""
        self._shards += 1
        self._images += facts["rows_ok"]
        self._clipped += facts["clipped"]
        self._seconds.update(facts["seconds"])
        if device := facts["made_by"].get("device"):
            self._devices[device] += 1

    def figures(self, unread: int) -> dict[str, Any]:
        """As `RecordedShards.figures`."""
        return {
            "seconds": dict(self._seconds.most_common()) if self._shards else None,
            "timed_images": self._images,
            "shards": self._shards,
            "unread_shards": unread,
            "devices": dict(self._devices),
            "clipped": self._clipped,
        }


def _histogram(nbytes: Any, bins: int = 24) -> dict[str, Any] | None:
    if len(nbytes) == 0:
        return None
    counts, edges = np.histogram(nbytes, bins)
    return {"counts": counts.tolist(), "edges": edges.tolist()}
