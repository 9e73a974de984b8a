"""The store in figures: variance, bytes, seconds, failures, configuration."""

from collections import Counter
from typing import Any

import numpy as np

from densefeat import layout
from densefeat.page.listing import without_features
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet
from densefeat.store import FeatureStore

__all__ = ["ShardSums", "manifest_figures", "store_figures"]

_FAILURES = 50


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
        "bytes": store.nbytes,
        "uncompressed_bytes_per_image": store.uncompressed_nbytes,
        "sizes": _histogram(nbytes.to_numpy()),
        "failures": without_features(store.index, pending=False)[:_FAILURES],
        "configuration": store.attributes["configuration"],
        "configuration_hash": store.attributes["configuration_hash"],
        "versions": store.attributes.get("versions", {}),
    }


def manifest_figures(objects: Objects) -> dict[str, Any]:
    """Figures of the shards of a finished store; see `ShardSums.figures`.

    Raises:
        ValueError, OSError: the manifest is damaged, or the storage failed.
    """
    manifest = read_parquet(objects.get(layout.MANIFEST))
    sums = ShardSums()
    for record in manifest.select(["rows_ok", "clipped", "seconds", "made_by"]).to_pylist():
        sums.add({**record, "seconds": dict(record["seconds"] or []), "made_by": dict(record["made_by"] or [])})
    return sums.figures()


class ShardSums:
    """Sums over the records of shards."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._devices: Counter[str] = Counter()
        self._shards = self._images = self._clipped = 0

    def add(self, facts: dict[str, Any]) -> None:
        """Add a record's ``rows_ok``, ``clipped``, ``seconds`` by stage and ``made_by``."""
        self._shards += 1
        self._images += facts["rows_ok"]
        self._clipped += facts["clipped"]
        self._seconds.update(facts["seconds"])
        if device := facts["made_by"].get("device"):
            self._devices[device] += 1

    def figures(self) -> dict[str, Any]:
        """``seconds`` by stage, the longest first (None before the first shard), and what they are of, to be shown."""
        return {
            "seconds": dict(self._seconds.most_common()) if self._shards else None,
            "timed_images": self._images,
            "shards": self._shards,
            "devices": dict(self._devices),
            "clipped": self._clipped,
        }


def _histogram(nbytes: Any, bins: int = 24) -> dict[str, Any] | None:
    if len(nbytes) == 0:
        return None
    counts, edges = np.histogram(nbytes, bins)
    return {"counts": counts.tolist(), "edges": edges.tolist()}
