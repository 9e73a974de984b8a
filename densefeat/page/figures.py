"""The store in figures: variance, bytes, seconds, failures, configuration."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.parquet import read_parquet
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore

__all__ = ["store_figures"]


def store_figures(store: FeatureStore, objects: Objects, *, finished: bool) -> dict[str, Any]:
    """All figures, JSON-serializable.

    Raises:
        StoreError, OSError: the store is damaged, or its storage failed.
    """
    index = store.index
    nbytes = index["chunk_nbytes"].drop_null()
    found = {
        "explained_variance_ratio": store.array("pca/explained_variance_ratio").tolist(),
        "explained_variance": store.attributes.get("explained_variance"),
        "images": len(nbytes),
        "bytes": pc.sum(nbytes).as_py() or 0,
        "uncompressed_bytes_per_image": store.layout.image_nbytes,
        "sizes": _histogram(nbytes.to_numpy()),
        "failures": _failures(store),
        "configuration": store.attributes["configuration"],
        "configuration_hash": store.attributes["configuration_hash"],
        "versions": store.attributes.get("versions", {}),
        "seconds": None,
    }
    return {**found, **(_manifest(objects) if finished else {})}


def _manifest(objects: Objects) -> dict[str, Any]:
    manifest = read_parquet(objects.get(layout.MANIFEST))
    seconds: Counter[str] = Counter()
    for one in manifest["seconds"].to_pylist():
        seconds.update(dict(one or []))
    hosts = Counter(dict(one or []).get("device") for one in manifest["made_by"].to_pylist())
    return {
        "seconds": dict(seconds.most_common()),
        "shards": manifest.num_rows,
        "devices": {name: count for name, count in hosts.items() if name},
        "clipped": pc.sum(manifest["clipped"]).as_py() or 0,
    }


def _failures(store: FeatureStore, most: int = 50) -> list[dict[str, Any]]:
    """Failed rows by status and reason, the most frequent first."""
    index = store.index.select(["row", "status", "error"])
    failed = index.filter(pc.invert(pc.is_in(index["status"], pa.array(["ok", "pending"]))))
    groups = failed.group_by(["status", "error"]).aggregate([("row", "count"), ("row", "min")]).to_pylist()
    groups.sort(key=lambda group: -group["row_count"])
    return [
        {"status": one["status"], "error": one["error"], "rows": one["row_count"], "first": one["row_min"]}
        for one in groups[:most]
    ]


def _histogram(nbytes: Any, bins: int = 24) -> dict[str, Any] | None:
    if len(nbytes) == 0:
        return None
    counts, edges = np.histogram(nbytes, bins)
    return {"counts": counts.tolist(), "edges": edges.tolist()}
