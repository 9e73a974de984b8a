"""``densefeat info --strict``: stores of the pipeline conform, damaged ones do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr

from densefeat import FeatureStore, command_line, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import parquet_bytes, read_parquet
from tests.helpers.stores import KnownStore, make_store, set_up_store


@pytest.fixture(params=["int8", "float16"])
def known(request: pytest.FixtureRequest, tmp_path: Path) -> KnownStore:
    return make_store(str(tmp_path / "store"), request.param)


def strict(uri: str, *options: str) -> int:
    with pytest.raises(SystemExit) as exit:
        command_line.main(["info", uri, "--strict", *options])
    return int(str(exit.value.code))


def test_stores_conform(known: KnownStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert strict(known.uri) == 0
    assert capsys.readouterr().out == f"{known.uri} conforms to format version 1\n"
    assert strict(known.uri, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"uri": known.uri, "format_version": 1, "problems": []}


def test_unfinished_stores_do_too(tmp_path: Path) -> None:
    assert problems(FeatureStore(set_up_store(str(tmp_path / "store")).uri)) == []


def in_index(
    column: str, change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None, table: str = layout.INDEX
) -> Any:
    def damage(uri: str) -> None:
        objects = Objects(uri)
        index = read_parquet(objects.get(table))
        number = index.schema.get_field_index(column)
        field = index.schema.field(number) if kind is None else pa.field(column, kind)
        values = pa.array(change(index[column].to_pylist()), field.type)
        objects.put(table, parquet_bytes(index.set_column(number, field, values)))

    return damage


def in_manifest(column: str, change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Any:
    return in_index(column, change, kind, layout.MANIFEST)


def in_array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    def damage(uri: str) -> None:
        array = zarr.open_group(uri, mode="r+")[name]
        array[...] = change(array[...])

    return damage


def in_attributes(name: str, value: Any) -> Any:
    def damage(uri: str) -> None:
        path = Path(uri) / "zarr.json"
        root = json.loads(path.read_text())
        root["attributes"]["densefeat"][name] = value
        path.write_text(json.dumps(root))

    return damage


def two_axes(uri: str) -> None:
    group = zarr.open_group(uri, mode="r+")
    mean = group["pca/mean"][:][None]
    del group["pca/mean"]
    group.create_array("pca/mean", data=mean, chunks=mean.shape)


DAMAGES = {
    "affine of the wrong length": (
        in_index("affine", lambda all: [one and one[:5] for one in all]), "affine of rows that are ok has not always 6"
    ),
    "affine that is not finite": (
        in_index("affine", lambda all: [one and [float("nan"), *one[1:]] for one in all]), "affine .* out of range"
    ),
    "box beyond the features": (
        in_index("valid_box", lambda all: [one and [*one[:3], 99] for one in all]), "valid_box .* out of range"
    ),
    "a status of its own": (
        in_index("status", lambda all: ["fine" if one == "corrupt" else one for one in all]), "unknown status: fine"
    ),
    "a failed row with a chunk": (
        in_index("chunk_offset", lambda all: [one or 0 for one in all]), "rows are not ok, and have a chunk"
    ),
    "another type": (
        in_index("height", lambda all: all, pa.int64()), "the column height is int64, expected int32"
    ),
    "a basis that is not orthonormal": (in_array("pca/components", lambda one: 2 * one), "not orthonormal"),
    "a variance above 1": (in_attributes("explained_variance", 1.5), "explained_variance is 1.5, expected 0 … 1"),
    "a hash of another kind": (in_attributes("configuration_hash", "md5"), "configuration_hash is md5, that of"),
    "another configuration": (
        in_attributes("configuration", {"backbone": {"name": "x"}}), "configuration has no source(.|\n)*hash is "
    ),
    "a variance that is no number": (in_attributes("explained_variance", "0.8"), "explained_variance is '0.8', "),
    "appended images that are none": (in_attributes("appended", 3), "appended is damaged: 3"),
    "other steps": (in_attributes("step_sha256", "0" * 64), "step_sha256 (is 0000|is not null)"),
    "no key": (in_index("key", lambda all: [None, *all[1:]], pa.string()), "rows have no key"),
    "no size": (in_index("height", lambda all: [None for _ in all]), "height of rows that are ok is not always 1"),
    "a negative chunk": (
        in_index("chunk_nbytes", lambda all: [one and -5 for one in all]), "chunk_nbytes of rows that are ok is not"
    ),
    "an affine map that mirrors": (
        in_index("affine", lambda all: [one and [0.5, 0, 0, 0, -0.5, 0] for one in all]), "affine .* out of range"
    ),
    "an affine map that shears": (
        in_index("affine", lambda all: [one and [0.5, 0.1, 0, 0, 0.5, 0] for one in all]), "affine .* out of range"
    ),
    "boxes of text": (
        in_index("valid_box", lambda all: [one and "box" for one in all], pa.string()), "the column valid_box is string"
    ),
    "a mean with two axes": (two_axes, r"pca/mean is \[1, \d+\], expected \[C\]"),
    "no manifest in the manifest": (
        lambda uri: (Path(uri) / layout.MANIFEST).write_bytes(b"PAR1"), "manifest.parquet is damaged: "
    ),
    "a manifest of other shards": (
        in_manifest("shard", lambda all: [one + 1 for one in all]), r"manifest.parquet has other shards than 0 … \d"
    ),
    "a manifest of other rows": (
        in_manifest("rows_ok", lambda all: [one + 1 for one in all]), "manifest.parquet and .* differ in shard 0"
    ),
    "a manifest of another type": (
        in_manifest("sha256", lambda all: [0 for _ in all], pa.int64()), "column 'sha256' holds int64, expected string"
    ),
    "a shard without a record": (
        lambda uri: (Path(uri) / layout.ledger_key(1)).unlink(), "the ledger has no record of shard 1"
    ),
    "class names that are none": (in_attributes("class_names", [1]), "class_names is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(known: KnownStore, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGES[name]
    damage(known.uri)
    assert strict(known.uri) == 1
    import re

    assert re.search(words, capsys.readouterr().out)
    for command in ("info", "card"):  # they print, or refuse
        with pytest.raises(SystemExit) as exit:
            command_line.main([command, known.uri])
        assert exit.value.code in (0, 2)


def test_every_column_is_in_the_document() -> None:
    from densefeat.conformance import _COLUMNS, _MANIFEST, _STATUSES
    from densefeat.rows.retired import RETIRED
    from schemas.index import FAILED, INDEX, OK, PENDING
    from schemas.ledger import MANIFEST

    assert pa.schema(list(_COLUMNS.items())).equals(pa.schema([(field.name, field.type) for field in INDEX]))
    assert pa.schema(list(_MANIFEST.items())).equals(pa.schema([(field.name, field.type) for field in MANIFEST]))
    assert {OK, PENDING, RETIRED, *FAILED} == _STATUSES
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert all(f"`{name}`" in text for name in [*INDEX.names, *MANIFEST.names, *_STATUSES])
