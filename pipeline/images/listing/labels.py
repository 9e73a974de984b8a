"""Convert the labels of a dataset to one int64 per image, and the names of the classes."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images.listing.findings import Tally
from pipeline.images.listing.names import escaped

__all__ = [
    "LABEL_COLUMNS",
    "Labels",
    "class_name",
    "column_labels",
    "folder_label",
    "no_labels",
    "text_labels",
    "unify_labels",
]

LABEL_COLUMNS = ("label", "cls", "labels")

_INTEGER = re.compile(r"\s*[+-]?\d{1,19}(\.0*)?\s*", re.ASCII)
_LONGEST_NAME = 256  # characters; a longer text describes the image rather than names a class
_MOST_NAMES = 100_000
_INT64 = range(-(2**63), 2**63)
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
_TEXTS = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
    pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary,
)  # fmt: skip
_EMPTY = ("", b"")  # no label, like null


class Labels(NamedTuple):
    """The labels of one file's rows, as stored in the file.

    Attributes:
        values: [rows] int64 or string; null if a row has no label.
        names: class names of integer labels, if the file declares them (Hugging Face's ClassLabel).
    """

    values: pa.Array
    names: tuple[str, ...] = ()


def no_labels(rows: int) -> Labels:
    """Null labels for ``rows`` images."""
    return Labels(pa.nulls(rows, pa.int64()))


def folder_label(path: str) -> str | None:
    """The innermost label in a Hive-style path such as ``…/label=3/part.parquet``; None if there is none."""
    for part in reversed(path.split("/")[:-1]):
        name, equals, value = part.partition("=")
        if equals and name in LABEL_COLUMNS:
            return None if value == _HIVE_NULL else unquote(value)
    return None


def column_labels(column: pa.ChunkedArray, name: str, uri: str, tally: Tally) -> Labels:
    """The labels in a column of a Parquet file.

    Integers, whole numbers of any other type and booleans (0 and 1) are labels; text, binary and dictionaries of text
    are class names. Other values (1.5, NaN, more than 63 bits) and columns of other types (list, struct, date) are
    counted as not used.

    Args:
        column: values of the column.
        name: of the column.
        uri: of the file.
        tally: counts what is not used.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, where = column.type, f"column {name} of {uri}"
    if pa.types.is_null(kind):
        return no_labels(len(column))
    if any(is_kind(kind) for is_kind in _NUMBERS):
        values = (column.cast(pa.float32()) if pa.types.is_float16(kind) else column).combine_chunks()
        return Labels(_translated(values, _whole, pa.int64(), "labels that are not whole numbers", where, tally))
    if any(is_kind(kind) for is_kind in _TEXTS):
        # Cast to bytes first, since strings may contain invalid UTF-8.
        plain = column.cast(pa.string()) if pa.types.is_string_view(kind) else column
        values = plain.cast(pa.binary()).combine_chunks()
        return Labels(_translated(values, class_name, pa.string(), "labels that are too long for a name", where, tally))
    tally.add("label", f"labels of the type {kind}", where, len(column) - column.null_count)
    return no_labels(len(column))


def text_labels(texts: Sequence[str | None]) -> Labels:
    """Labels given as text, such as those of ``.cls`` members; an empty text counts as no label."""
    return Labels(pa.array([text or None for text in texts], pa.string()))


def unify_labels(parts: Sequence[Labels], tally: Tally) -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """Number the labels of all files of a dataset consistently.

    * If files declare names for their integers, the classes are these names in order of first appearance; files that
      declare other names, or another order, are renumbered. A label below 0 (hidden) counts as no label.
    * Texts are parsed as integers if most of them are. Otherwise they are class names, and the label is the index in
      the sorted names.

    Args:
        parts: one per file.
        tally: counts labels that do not fit: of another kind than most, or beyond the declared names.

    Returns:
        The labels of all rows (int64, null if there is none), and the class names (empty if there are none).
    """
    declared = tuple(dict.fromkeys(name for part in parts for name in part.names))
    texts = Counter[str]()
    for part in parts:
        if pa.types.is_string(part.values.type):
            texts.update({count["values"]: count["counts"] for count in _value_counts(part.values)})
    words = sum(count for text, count in texts.items() if _parsed(text) is None)
    numbers = sum(len(part.values) - part.values.null_count for part in parts) - words
    if declared:
        arrays = [_declared(part, declared, tally) for part in parts]
        return pa.chunked_array(arrays, pa.int64()), declared
    if words <= numbers:
        return pa.chunked_array([_numbers(part, tally) for part in parts], pa.int64()), ()
    names = tuple(sorted(texts))
    if len(names) > _MOST_NAMES:
        tally.add("label", f"text labels with {len(names):,} different values, too many for classes", names[0], words)
        return pa.chunked_array([pa.nulls(len(part.values), pa.int64()) for part in parts], pa.int64()), ()
    return pa.chunked_array([_named(part, names, tally) for part in parts], pa.int64()), names


def _named(part: Labels, names: tuple[str, ...], tally: Tally) -> pa.Array:
    """Texts as indices into ``names``."""
    place = {name: label for label, name in enumerate(names)}
    if pa.types.is_string(part.values.type):
        return _translated(part.values, place.get, pa.int64(), "labels that are not a known class", "", tally)
    return _translated(
        part.values, lambda number: None, pa.int64(), "labels that are numbers, where most are text", "", tally
    )


def _declared(part: Labels, names: tuple[str, ...], tally: Tally) -> pa.Array:
    """Integers as indices into ``names``, by the names that their file declares."""
    if pa.types.is_string(part.values.type):
        return _named(part, names, tally)
    place = {name: label for label, name in enumerate(names)}
    own = [place[name] for name in part.names or names]  # a file may lack the declaration of the others
    shown = pc.if_else(pc.less(part.values, 0), pa.scalar(None, pa.int64()), part.values)

    def renumbered(label: int) -> int | None:
        return own[label] if label < len(own) else None

    return _translated(shown, renumbered, pa.int64(), "labels beyond the names of the classes", "", tally)


def _numbers(part: Labels, tally: Tally) -> pa.Array:
    if pa.types.is_integer(part.values.type):
        return part.values
    return _translated(part.values, _parsed, pa.int64(), "labels that are text, where most are numbers", "", tally)


def _translated(
    values: pa.Array, translate: Callable[[Any], Any], kind: pa.DataType, reason: str, where: str, tally: Tally
) -> pa.Array:
    """Map each value by ``translate``, called once per distinct value; values that give None are counted."""
    encoded = values.dictionary_encode()
    different = encoded.dictionary.to_pylist()
    new = [None if value is None or value in _EMPTY else translate(value) for value in different]
    lost = {place for place, value in enumerate(different) if new[place] is None and value not in (None, *_EMPTY)}
    if lost:
        count = pc.sum(pc.is_in(encoded.indices, pa.array(sorted(lost), encoded.indices.type))).as_py()
        tally.add("label", reason, " in ".join(filter(None, [str(different[min(lost)]), where])), count or 0)
    return pa.array(new, kind).take(encoded.indices)


def _value_counts(values: pa.Array) -> list[dict[str, Any]]:
    counts: list[dict[str, Any]] = values.drop_null().value_counts().to_pylist()
    return counts


def _whole(value: bool | int | float | Decimal) -> int | None:
    if isinstance(value, float | Decimal):
        if not math.isfinite(value) or value != int(value):
            return None
        value = int(value)
    return int(value) if value in _INT64 else None


def _parsed(text: str) -> int | None:
    if not _INTEGER.fullmatch(text):
        return None
    return _whole(int(text.strip().partition(".")[0]))


def class_name(text: bytes) -> str | None:
    """Decode a class name; None if it is too long."""
    name = escaped(text.decode("utf-8", "surrogateescape"))
    return name if len(name) <= _LONGEST_NAME else None
