"""Check a store against its format (docs/format.md), without reading features."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.rows.retired import RETIRED
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore

__all__ = ["problems", "report_problems"]

_COLUMNS = {
    "row": pa.int64(), "key": pa.string(), "uri": pa.string(), "offset": pa.int64(), "nbytes": pa.int64(),
    "label": pa.int64(), "status": pa.string(), "error": pa.string(), "height": pa.int32(), "width": pa.int32(),
    "affine": pa.list_(pa.float64()), "valid_box": pa.list_(pa.int32()),
    "chunk_offset": pa.int64(), "chunk_nbytes": pa.int64(),
}  # fmt: skip
_FAILED = (
    "unreadable", "corrupt", "unsupported", "too_large", "too_small", "nonfinite", "constant", "diverged", "crashed",
)  # fmt: skip
_STATUSES = frozenset({"ok", "pending", RETIRED, *_FAILED})
_PARTS = ("source", "backbone", "geometry", "pca", "upsampler", "storage")
_REPORT = (
    "rows", "shards", "nbytes", "seconds", "images_per_second", "stage_seconds", "made_on", "options", "versions",
)  # fmt: skip
_ORTHONORMAL = 1e-3  # of the entries of components · componentsᵀ


def problems(store: FeatureStore) -> list[str]:
    """What is not as in docs/format.md, one message each; none if the store conforms.

    Opening the store has checked the layout of the features, and the types of the attributes that readers need.
    """
    found = []
    for check in (_attributes, _retired, _basis, _step, _index):
        try:
            found += list(check(store))
        except StoreError as error:
            found.append(str(error).removeprefix(f"{store.uri}: "))
    return [*dict.fromkeys(found), *report_problems(store._objects)]  # two checks may need the same damaged object


def report_problems(objects: Objects) -> list[str]:
    """What is wrong with the reports of runs, one message each; none where the storage cannot list them."""
    found = []
    for key in sorted(objects.list(layout.REPORTS)) if objects.can_list else ():
        if not re.fullmatch(layout.REPORT_KEY, key):
            found.append(f"{key} is not the name of a report")
            continue
        try:
            report = json.loads(objects.get(key))
        except ValueError as error:
            found.append(f"{key} is damaged: {error}. Nothing depends on it: delete it")
            continue
        if missing := [name for name in _REPORT if not isinstance(report, dict) or name not in report]:
            found.append(f"{key} is not a report: it has no {', '.join(missing)}")
    return found


def _attributes(store: FeatureStore) -> Iterator[str]:
    own = store.attributes
    if missing := [name for name in _PARTS if not isinstance(own["configuration"].get(name), dict)]:
        yield f"the attribute configuration has no {', '.join(missing)}"
    if len(own["configuration_hash"]) != 64 or set(own["configuration_hash"]) - set("0123456789abcdef"):
        yield "the attribute configuration_hash is no SHA-256 in hex"
    _ = store.class_names, store.has_embedding  # reading them checks them
    yield from _appended(store)
    share = own.get("explained_variance")
    if share is not None and not 0 <= share <= 1 + 1e-6:
        yield f"the attribute explained_variance is {share}, expected 0 … 1"


def _appended(store: FeatureStore) -> Iterator[str]:
    """Whether the sources that were appended have the rows that the first one does not have."""
    appended, first = store.attributes.get("appended", []), store.attributes["configuration"].get("source", {})
    try:
        total = first["rows"] + sum(source["rows"] for source in appended)
        sound = all(isinstance(source[name], str) for source in appended for name in ("images", "keys_sha256"))
    except (LookupError, TypeError):
        sound = False
    if appended and not sound:
        yield f"the attribute appended is damaged: {appended}"
    elif appended and total != len(store):
        yield f"the attribute appended says that the store has {total:,} rows: it has {len(store):,}"


def _retired(store: FeatureStore) -> Iterator[str]:
    """Whether the list of retired rows names each row of the store at most once, in order."""
    rows = store.retired["row"].to_numpy()
    if len(rows) and not (rows[0] >= 0 and rows[-1] < len(store) and (np.diff(rows) > 0).all()):
        yield f"the list of retired rows is not ascending, or has other rows than 0 … {len(store) - 1}"


def _basis(store: FeatureStore) -> Iterator[str]:
    k, (channels,) = store.layout.components, store.mean.shape
    if store.components.shape != (k, channels):
        yield f"pca/components is {list(store.components.shape)}, expected [{k}, {channels}]"
        return
    product = store.components.astype(np.float64) @ store.components.T
    if np.abs(product - np.eye(k)).max() > _ORTHONORMAL:
        yield "the rows of pca/components are not orthonormal"
    for name in ("explained_variance", "explained_variance_ratio"):
        if (shape := store.array(f"{layout.PCA}/{name}").shape) != (k,):
            yield f"pca/{name} is {list(shape)}, expected [{k}]"


def _step(store: FeatureStore) -> Iterator[str]:
    if store.step is not None and (store.step.ndim != 1 or not (store.step > 0).all()):
        yield "step has values that are not greater than 0, or more than one axis"


def _index(store: FeatureStore) -> Iterator[str]:
    index = store.index
    for name, kind in _COLUMNS.items():
        if name not in index.column_names or index.schema.field(name).type != kind:
            got = index.schema.field(name).type if name in index.column_names else "nothing"
            yield f"index.parquet: the column {name} is {got}, expected {kind}"
    if unknown := set(index["status"].unique().to_pylist()) - _STATUSES:
        yield f"index.parquet has an unknown status: {', '.join(sorted(map(str, unknown)))}"
    done = index.filter(pc.equal(index["status"], "ok"))
    if done["chunk_offset"].null_count or done["chunk_nbytes"].null_count:
        yield "index.parquet: rows are ok, and have no chunk"
    elif (index["chunk_offset"].is_valid().to_numpy() != (index["status"].to_numpy() == "ok")).any():
        yield "index.parquet: rows are not ok, and have a chunk"
    yield from _lists(done, "affine", 6, lambda values: np.isfinite(values).all())
    yield from _lists(done, "valid_box", 4, lambda boxes: _inside(boxes, store.shape[1:]))


def _lists(done: pa.Table, name: str, length: int, valid: Callable[[Any], bool]) -> Iterator[str]:
    column = done[name].combine_chunks()
    lengths = pc.list_value_length(column)
    if column.null_count or not pc.all(pc.equal(lengths, length), min_count=0).as_py():
        yield f"index.parquet: {name} of rows that are ok has not always {length} values"
    elif not valid(pc.list_flatten(column).to_numpy().reshape(-1, length)):
        yield f"index.parquet: {name} of rows that are ok has values out of range"


def _inside(boxes: Any, size: tuple[int, int]) -> bool:
    y0, x0, y1, x1 = boxes.T
    return bool(((y0 >= 0) & (x0 >= 0) & (y0 < y1) & (x0 < x1) & (y1 <= size[0]) & (x1 <= size[1])).all())
