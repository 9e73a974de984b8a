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
from densefeat.rows.ledger import check_columns
from densefeat.rows.retired import RETIRED
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet
from densefeat.store import FeatureStore

__all__ = ["problems", "report_problems"]

_COLUMNS = {
    "row": pa.int64(), "key": pa.string(), "uri": pa.string(), "offset": pa.int64(), "nbytes": pa.int64(),
    "label": pa.int64(), "status": pa.string(), "error": pa.string(), "height": pa.int32(), "width": pa.int32(),
    "affine": pa.list_(pa.float64()), "valid_box": pa.list_(pa.int32()),
    "chunk_offset": pa.int64(), "chunk_nbytes": pa.int64(),
}  # fmt: skip
_MANIFEST = {
    "shard": pa.int64(), "rows_ok": pa.int64(), "rows_failed": pa.int64(), "nbytes": pa.int64(), "sha256": pa.string(),
    "configuration_hash": pa.string(), "clipped": pa.int64(),
    "seconds": pa.map_(pa.string(), pa.float64()), "made_by": pa.map_(pa.string(), pa.string()),
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
    found: list[str] = []
    for part, check in _CHECKS.items():
        try:
            found.extend(check(store))  # also those before an error
        except StoreError as error:
            found.append(str(error).removeprefix(f"{store.uri}: "))
        except (LookupError, TypeError, ValueError, AttributeError, NotImplementedError) as error:  # too damaged to say
            found.append(f"{part} cannot be checked: {type(error).__name__}: {error}")
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
    if own["configuration_hash"] != (expected := layout.configuration_sha256(own["configuration"])):
        yield f"the attribute configuration_hash is {own['configuration_hash']}, that of configuration is {expected}"
    _ = store.class_names, store.has_embedding  # reading them checks them
    yield from _appended(store)
    share = own.get("explained_variance")
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1 + 1e-6):
        yield f"the attribute explained_variance is {share!r}, expected 0 … 1"


def _appended(store: FeatureStore) -> Iterator[str]:
    """Whether the sources that were appended have the rows that the first one does not have."""
    appended, first = store.attributes.get("appended", []), store.attributes["configuration"].get("source", {})
    try:
        total = first["rows"] + sum(source["rows"] for source in appended or ())
        sound = isinstance(appended, list) and all(
            isinstance(source[name], str) for source in appended for name in ("images", "keys_sha256")
        )
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
    if store.mean.ndim != 1:
        yield f"pca/mean is {list(store.mean.shape)}, expected [C]"
        return
    k, channels = store.layout.components, len(store.mean)
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
    named = store.attributes.get("step_sha256")
    if store.step is None:
        if named is not None:
            yield "the attribute step_sha256 is not null, and the features are float16"
        return
    if store.step.ndim != 1 or not (store.step > 0).all():
        yield "step has values that are not greater than 0, or more than one axis"
    if store.attributes["setup_complete"] and named != (expected := layout.step_sha256(store.step)):
        yield f"the attribute step_sha256 is {named}, that of step is {expected}"


def _index(store: FeatureStore) -> Iterator[str]:
    index, wrong = store.index, False
    for name, kind in _COLUMNS.items():
        if name not in index.column_names or index.schema.field(name).type != kind:
            got = index.schema.field(name).type if name in index.column_names else "nothing"
            yield f"index.parquet: the column {name} is {got}, expected {kind}"
            wrong = True
    if wrong:
        return
    if index["key"].null_count:
        yield "index.parquet: rows have no key"
    if unknown := set(index["status"].unique().to_pylist()) - _STATUSES:
        yield f"index.parquet has an unknown status: {', '.join(sorted(map(str, unknown)))}"
    done = index.filter(pc.equal(index["status"], "ok"))
    if done["chunk_offset"].null_count or done["chunk_nbytes"].null_count:
        yield "index.parquet: rows are ok, and have no chunk"
    elif (index["chunk_offset"].is_valid().to_numpy() != (index["status"].to_numpy() == "ok")).any():
        yield "index.parquet: rows are not ok, and have a chunk"
    for name, least in (("chunk_offset", 0), ("chunk_nbytes", 1), ("height", 1), ("width", 1)):
        if done[name].null_count or not pc.all(pc.greater_equal(done[name], least), min_count=0).as_py():
            yield f"index.parquet: {name} of rows that are ok is not always {least} or more"
    yield from _lists(done, "affine", 6, _scales_and_shifts)
    yield from _lists(done, "valid_box", 4, lambda boxes: _inside(boxes, store.shape[1:]))


def _manifest(store: FeatureStore) -> Iterator[str]:
    """Whether the shards of a finished store are in its manifest and its ledger, as the index has them."""
    objects, shards = store._objects, store.layout.shards
    try:
        manifest = read_parquet(objects.get(layout.MANIFEST))
    except FileNotFoundError:
        return  # it is not finished
    except ValueError as error:
        yield f"{layout.MANIFEST} is damaged: {error}"
        return
    if objects.can_list:
        records = set(objects.list(layout.LEDGER))
        if missing := [shard for shard in range(shards) if layout.ledger_key(shard) not in records]:
            yield f"the ledger has no record of shard {missing[0]}, and the store is finished"
    try:
        check_columns(manifest, _MANIFEST)
    except ValueError as error:
        yield f"{layout.MANIFEST}: {error}"
        return
    if manifest["shard"].to_pylist() != list(range(shards)):
        yield f"{layout.MANIFEST} has other shards than 0 … {shards - 1}"
        return
    done, unused = (_rows_by_shard(store, status) for status in ("ok", RETIRED))
    ok, failed = (manifest[name].to_numpy() for name in ("rows_ok", "rows_failed"))
    rows = np.array([len(store.layout.rows_of(shard)) for shard in range(shards)])
    if len(wrong := np.flatnonzero((ok < done) | (ok > done + unused) | (ok + failed != rows))):
        yield f"{layout.MANIFEST} and index.parquet differ in shard {wrong[0]}"


def _rows_by_shard(store: FeatureStore, status: str) -> Any:
    rows = np.flatnonzero(pc.equal(store.index["status"], status).to_numpy())
    return np.bincount(rows // store.layout.shard_rows, minlength=store.layout.shards)


def _lists(done: pa.Table, name: str, length: int, valid: Callable[[Any], bool]) -> Iterator[str]:
    column = done[name].combine_chunks()
    lengths = pc.list_value_length(column)
    if column.null_count or not pc.all(pc.equal(lengths, length), min_count=0).as_py():
        yield f"index.parquet: {name} of rows that are ok has not always {length} values"
    elif not valid(pc.list_flatten(column).to_numpy().reshape(-1, length)):
        yield f"index.parquet: {name} of rows that are ok has values out of range"


def _scales_and_shifts(affine: Any) -> bool:
    """Whether maps [n, 6] are a positive scale and a shift of each axis."""
    scale_x, xy, _, yx, scale_y, _ = affine.T
    return bool(
        np.isfinite(affine).all() and (scale_x > 0).all() and (scale_y > 0).all() and not (xy.any() or yx.any())
    )


def _inside(boxes: Any, size: tuple[int, int]) -> bool:
    y0, x0, y1, x1 = boxes.T
    return bool(((y0 >= 0) & (x0 >= 0) & (y0 < y1) & (x0 < x1) & (y1 <= size[0]) & (x1 <= size[1])).all())


_CHECKS: dict[str, Callable[[FeatureStore], Iterator[str]]] = {
    "the attributes": _attributes,
    "the list of retired rows": _retired,
    "the PCA basis": _basis,
    "step": _step,
    "index.parquet": _index,
    "manifest.parquet": _manifest,
}
