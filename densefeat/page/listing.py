"""Which rows the wall shows. The index stays in Arrow; only the rows of one page become Python objects."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["counts", "matching_rows", "record", "records", "rows_with_text", "without_features"]

_SHOWN = ("row", "key", "label", "status", "error")


def rows_with_text(lower_keys: pa.ChunkedArray, text: str) -> npt.NDArray[Any]:
    """Rows whose key, given in lower case, contains ``text`` in any case: int64 [rows], ascending."""
    return np.flatnonzero(pc.match_substring(lower_keys, pc.utf8_lower(text).as_py()).to_numpy())


def matching_rows(
    index: pa.Table, rows: npt.NDArray[Any] | None = None, *, status: str = "", label: int | None = None
) -> npt.NDArray[Any]:
    """Those of ``rows`` (None: all) with this status and label: int64 [rows], in the order given.

    ``status`` "" is any, "failed" is any but ok and pending.
    """
    rows = np.arange(index.num_rows) if rows is None else rows
    if status:
        values = _column(index, "status", rows)
        names = pa.array(["ok", "pending"] if status == "failed" else [status])
        rows = rows[pc.is_in(values, names).to_numpy() ^ (status == "failed")]
    if label is not None:
        rows = rows[pc.fill_null(pc.equal(_column(index, "label", rows), label), False).to_numpy()]
    return rows


def _column(index: pa.Table, name: str, rows: npt.NDArray[Any]) -> pa.ChunkedArray:
    return index[name] if len(rows) == index.num_rows else index[name].take(pa.array(rows, pa.int64()))


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


def without_features(index: pa.Table, *, pending: bool = True) -> list[dict[str, Any]]:
    """Failed (and pending) rows by status and reason, the most frequent first: ``[{status, error, rows, first}]``.

    ``rows`` is how many there are, ``first`` the first of them.
    """
    left_out = pa.array(["ok"] if pending else ["ok", "pending"])
    table = index.select(["row", "status", "error"]).filter(pc.invert(pc.is_in(index["status"], left_out)))
    groups = table.group_by(["status", "error"]).aggregate([("row", "count"), ("row", "min")])
    found = groups.rename_columns({"row_count": "rows", "row_min": "first"}).to_pylist()
    return sorted(found, key=lambda one: (-one["rows"], one["first"]))


def _counted(column: pa.ChunkedArray) -> dict[Any, int]:
    return {one["values"]: one["counts"] for one in pc.value_counts(column).to_pylist()}


def _label_name(label: int | None, names: list[str]) -> str | None:
    if label is None:
        return None
    return names[label] if 0 <= label < len(names) else str(label)
