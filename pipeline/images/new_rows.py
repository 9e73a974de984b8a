"""The images of a source that a store does not have yet, with labels in the store's numbers."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images.listing.source import Source
from schemas.index import REFERENCES

__all__ = ["NewRows", "joined_names", "new_rows", "with_labels", "with_labels_of", "without_keys"]


@dataclass(frozen=True, eq=False)
class NewRows:
    """Images that are new to a store.

    Attributes:
        references: ``schemas.index.REFERENCES``.
        class_names: of the store, and new ones at the end.
        labels_left_out: number of new images whose label is not used.
    """

    references: pa.Table
    class_names: tuple[str, ...]
    labels_left_out: int


def new_rows(there: pa.Table, class_names: tuple[str, ...], source: Source) -> NewRows:
    """The images of a source whose keys a store does not have, in the order of the source.

    Labels with names get the store's number for that name; names that the store does not have get numbers after its
    own. A store without names, but with labels, has other numbers than the source; and so has a source without names,
    if the store has them. Such labels are null.

    Args:
        there: ``schemas.index.REFERENCES`` of the store.
        class_names: of the store.
        source: the images.
    """
    names = joined_names(there, class_names, source.class_names)
    new = _is_new(source.references, there)
    references = with_labels_of(source, names).filter(new)
    left_out = references["label"].null_count - source.references["label"].filter(new).null_count
    return NewRows(references, names if len(references) else class_names, left_out)


def joined_names(there: pa.Table, class_names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the labels when others come to them: ``class_names`` and new ones at the end.

    Labels without names keep their numbers, and get no names.

    Args:
        there: ``schemas.index.REFERENCES`` of the rows before.
        class_names: of their labels.
        others: class names of the other rows.
    """
    if class_names or there["label"].null_count == len(there):
        return tuple(dict.fromkeys((*class_names, *others)))
    return class_names


def without_keys(references: pa.Table, there: pa.Table) -> pa.Table:
    """The images whose keys are not ``there``."""
    return references.filter(_is_new(references, there))


def _is_new(references: pa.Table, there: pa.Table) -> pa.ChunkedArray:
    return pc.invert(pc.is_in(references["key"], value_set=there["key"].combine_chunks()))


def with_labels_of(source: Source, names: tuple[str, ...]) -> pa.Table:
    """References of a source, with the labels as numbers of ``names``; null if they cannot be told."""
    return with_labels(source.references, source.class_names, names)


def with_labels(references: pa.Table, class_names: tuple[str, ...], names: tuple[str, ...]) -> pa.Table:
    """References with labels of ``class_names``, as numbers of ``names``; null if they cannot be told."""
    if class_names == names:
        return references
    place = {name: label for label, name in enumerate(names)}
    numbers = pa.array([place.get(name) for name in class_names], pa.int64())
    labels = references["label"].combine_chunks()
    if class_names:
        known = pc.and_(pc.greater_equal(labels, 0), pc.less(labels, len(numbers)))
        labels = numbers.take(pc.if_else(known, labels, pa.scalar(None, pa.int64())))
    else:
        labels = pa.nulls(len(labels), pa.int64())
    return references.set_column(REFERENCES.get_field_index("label"), REFERENCES.field("label"), labels)
