"""Which rows the wall shows. The index stays in Arrow; only the rows of one page become Python objects."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["counts", "matching_rows", "record", "records", "without_features"]

_SHOWN = ("row", "key", "label", "status", "error")


def matching_rows(index: pa.Table, *, text: str = "", status: str = "", label: int | None = None) -> npt.NDArray[Any]:
    """Rows whose key contains ``text`` (in any case), with this status and label: int64 [rows], ascending.

    ``status`` "" is any, "failed" is any but ok and pending.
    """
    mask: Any = None
    conditions = []
    if text:
        conditions.append(pc.match_substring(index["key"], text, ignore_case=True))
    if status == "failed":
        conditions.append(pc.invert(pc.is_in(index["status"], pa.array(["ok", "pending"]))))
    elif status:
        conditions.append(pc.equal(index["status"], status))
    if label is not None:
        conditions.append(pc.fill_null(pc.equal(index["label"], label), False))
    for condition in conditions:
        mask = condition if mask is None else pc.and_(mask, condition)
    if mask is None:
        return np.arange(index.num_rows)
    return np.flatnonzero(mask.to_numpy())


def records(index: pa.Table, rows: npt.NDArray[Any], names: list[str]) -> list[dict[str, Any]]:
    """What the wall shows of ``rows``. ``names``: of the labels, perhaps none."""
    table = index.select(list(_SHOWN)).take(pa.array(rows, pa.int64()))
    found: list[dict[str, Any]] = table.to_pylist()
    for one in found:
        one["label_name"] = _label_name(one["label"], names)
    return found


def record(index: pa.Table, row: int, names: list[str]) -> dict[str, Any]:
    """Everything that the index has about one row, and the name of its label."""
    found: dict[str, Any] = index.slice(row, 1).to_pylist()[0]
    return {**found, "label_name": _label_name(found["label"], names)}


def counts(index: pa.Table, names: list[str], most: int = 1000) -> dict[str, Any]:
    """Rows by status, and by label (the ``most`` frequent, by label): ``[{label, name, rows}]``."""
    statuses = _counted(index["status"])
    labels = _counted(index["label"].drop_null())
    shown = sorted(label for label, _ in Counter(labels).most_common(most))
    return {
        "statuses": statuses,
        "labels": [{"label": one, "name": _label_name(one, names), "rows": labels[one]} for one in shown],
    }


def without_features(index: pa.Table) -> list[dict[str, Any]]:
    """Failed and pending rows by status and reason, the most frequent first: ``[{status, error, rows, first}]``.

    ``rows`` is how many there are, ``first`` the first of them.
    """
    table = index.select(["row", "status", "error"]).filter(pc.not_equal(index["status"], "ok"))
    groups = table.group_by(["status", "error"]).aggregate([("row", "count"), ("row", "min")])
    found = groups.rename_columns({"row_count": "rows", "row_min": "first"}).to_pylist()
    return sorted(found, key=lambda one: (-one["rows"], one["first"]))


def _counted(column: pa.ChunkedArray) -> dict[Any, int]:
    return {one["values"]: one["counts"] for one in pc.value_counts(column).to_pylist()}


def _label_name(label: int | None, names: list[str]) -> str | None:
    if label is None:
        return None
    return names[label] if 0 <= label < len(names) else str(label)
