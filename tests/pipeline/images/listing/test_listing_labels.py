"""Labels of Parquet columns and folders: used, or counted."""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.images.listing.findings import Tally
from pipeline.images.listing.labels import Labels, folder_label, text_labels, unify_labels
from pipeline.images.listing.source import Source, list_images
from tests.helpers.datasets import column, found

NOT_WHOLE = "labels that are not whole numbers"


def listed(folder: Path, **files: pa.Table | pa.Array) -> Source:
    """A dataset of files with images and these labels, or these columns."""
    for name, labels in files.items():
        table = labels if isinstance(labels, pa.Table) else pa.table({"label": labels})
        table = table.append_column("image", pa.array([b"x"] * table.num_rows))
        pq.write_table(table, folder / f"{name}.parquet")
    return list_images(str(folder))


def class_label(labels: list[int | None], names: list[str], column: str = "label") -> pa.Table:
    features = {column: {"names": names, "_type": "ClassLabel"}}
    table = pa.table({column: pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize(
    ("values", "labels", "not_whole"),
    [
        (pa.array([3, None, -1], pa.int8()), [3, None, -1], 0),
        (pa.array([3, 2**64 - 1, 2**63], pa.uint64()), [3, None, None], 2),
        (pa.array([2**63 - 1], pa.uint64()), [2**63 - 1], 0),
        (pa.array([1.0, None, 2.5, float("nan"), float("inf"), 1e300, -0.0]), [1, None, None, None, None, None, 0], 4),
        (pa.array(np.array([1, 2.5], np.float16)), [1, None], 1),
        (pa.array([Decimal("3.00"), Decimal("0.25"), None]), [3, None, None], 1),
        (pa.array([Decimal(10**20)]), [None], 1),
        (pa.array([True, False, None]), [1, 0, None], 0),
        (pa.array([7, 8, 7]).dictionary_encode(), [7, 8, 7], 0),
        (pa.array([1.0, 1.5]).dictionary_encode(), [1, None], 1),
        (pa.array(["3", " 2 ", "1.0", None, ""]), [3, 2, 1, None, None], 0),
    ],
)
def test_numbers(tmp_path: Path, values: pa.Array, labels: list[int | None], not_whole: int) -> None:
    source = listed(tmp_path, x=values)
    assert column(source, "label") == labels
    assert source.class_names == ()
    assert found(source, "label") == ({NOT_WHOLE: not_whole} if not_whole else {})


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
def test_texts_are_names_of_classes(tmp_path: Path, kind: pa.DataType) -> None:
    values = [None if text is None else text.encode() for text in ("dog", "Äpfel", None, "cat", "dog", "2001")]
    source = listed(tmp_path, x=pa.array(values, pa.binary()).cast(pa.string()).cast(kind))
    assert source.class_names == ("2001", "cat", "dog", "Äpfel")
    assert column(source, "label") == [2, 3, None, 1, 2, 0]


def test_dictionaries_of_text_of_several_row_groups(tmp_path: Path) -> None:
    table = pa.table({"label": pa.array(["b", "a", "b", "c"]).dictionary_encode(), "image": [b""] * 4})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    source = list_images(str(tmp_path))
    assert (source.class_names, column(source, "label")) == (("a", "b", "c"), [1, 0, 1, 2])


def test_texts_of_several_files_are_one_numbering(tmp_path: Path) -> None:
    source = listed(tmp_path, x=pa.array(["dog", "cat"]), y=pa.array(["dog", "ape"]).dictionary_encode())
    assert (source.class_names, column(source, "label")) == (("ape", "cat", "dog"), [2, 1, 2, 0])


def test_declared_names_that_differ_between_files(tmp_path: Path) -> None:
    source = listed(
        tmp_path,
        a=class_label([0, 1, -1], ["cat", "dog"]),
        b=class_label([0, 1, 2, 3], ["dog", "ape", "cat"]),
        c=pa.array([1]),
        d=pa.array(["ape", "eel"]),
    )
    assert source.class_names == ("cat", "dog", "ape")
    assert column(source, "label") == [0, 1, None, 1, 2, 0, None, 1, 2, None]
    assert found(source, "label") == {
        "labels beyond the names of the classes": 1,
        "labels that are not a known class": 1,
    }


def test_a_column_of_another_name_that_is_declared(tmp_path: Path) -> None:
    source = listed(tmp_path, a=class_label([1, 0], ["x", "y"], "fine_label"))
    assert (source.class_names, column(source, "label")) == (("x", "y"), [1, 0])


def test_what_cannot_be_a_label_is_counted(tmp_path: Path) -> None:
    source = listed(tmp_path, a=pa.array([[1, 2], None, []]), b=pa.array(["x" * 300, "y" * 3]))
    assert column(source, "label") == [None] * 4 + [0]
    assert found(source, "label") == {
        "labels of the type list<element: int64>": 2,
        "labels that are too long for a name": 1,
    }


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    source = listed(tmp_path, a=pa.array([b"caf\xe9", b"tea"]).view(pa.string()))
    assert (source.class_names, column(source, "label")) == (("caf\\xe9", "tea"), [0, 1])


@pytest.mark.parametrize(
    ("folders", "labels", "names"),
    [
        ({"label=3": 2, "label=10": 1}, [10, 3, 3], ()),
        ({"x=1/label=cat": 1, "x=1/label=a%20dog": 1}, [0, 1], ("a dog", "cat")),
        ({"label=1": 1, "label=__HIVE_DEFAULT_PARTITION__": 1}, [1, None], ()),
        ({"label=1/split=a": 1, "label=2/split=a": 1}, [1, 2], ()),
    ],
)
def test_folders(tmp_path: Path, folders: dict[str, int], labels: list[int | None], names: tuple[str, ...]) -> None:
    for folder, rows in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"image": [b"x"] * rows}), tmp_path / folder / "part.parquet")
    source = list_images(str(tmp_path))
    assert column(source, "label") == labels
    assert source.class_names == names
    assert len(set(column(source, "key"))) == len(labels)


def test_a_folder_that_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "label=3").mkdir()
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "label=3" / "part.parquet")
    for images in ("label=3", "label=3/part.parquet", "*/*.parquet"):
        assert column(list_images(f"{tmp_path}/{images}"), "label") == [3]


def test_a_column_comes_before_the_folder() -> None:
    assert folder_label("/a/label=x/cls=y/p.parquet") == "y"
    assert folder_label("/a/label=x") is None


@given(st.lists(st.lists(st.sampled_from([None, "1", "2", "a", "b"]) | st.integers(0, 3), max_size=6), max_size=4))
def test_every_label_is_used_or_counted(files: list[list[str | int | None]]) -> None:
    parts = []
    for values in files:
        if any(isinstance(value, int) for value in values):
            parts.append(Labels(pa.array([value if isinstance(value, int) else None for value in values], pa.int64())))
        else:
            parts.append(text_labels([value for value in values if not isinstance(value, int)]))
    tally = Tally()
    labels, names = unify_labels(parts, tally)
    given_labels = sum(len(part.values) - part.values.null_count for part in parts)
    lost = sum(finding.count for finding in tally.findings())
    assert len(labels) - labels.null_count + lost == given_labels
    assert lost <= given_labels / 2
    assert all(label < len(names) for label in labels.drop_null().to_pylist()) or not names
