"""Rows that are out of use stay behind when a store is converted or merged."""

from pathlib import Path

import numpy as np
import pytest

from densefeat import FeatureStore, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.store.converting.convert import DenseStorage, convert
from pipeline.store.converting.joining import joined
from pipeline.store.converting.merge import merge
from pipeline.store.retirement import restore, restore_all, retire
from pipeline.store.verify import StoreCheck
from tests.helpers.stores import FAILED_ROWS, ROWS, Kind, make_part, make_store

REASON = "consent withdrawn"
OUT = (0, 5, FAILED_ROWS[1])
IN_USE = [row for row in range(ROWS) if row not in (*FAILED_ROWS, *OUT)]


def test_a_conversion_leaves_them_out_for_good(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    retire(Objects(known.uri), OUT, REASON)
    target = Objects(str(tmp_path / "converted"))
    convert(FeatureStore(known.uri), target, DenseStorage("float16", 0, 4), resume=False, threads=2)
    store = FeatureStore(target.uri)
    assert store.rows_with_features.tolist() == IN_USE
    assert (store.index["status"][5].as_py(), store.index["error"][5].as_py()) == ("retired", REASON)
    assert problems(store) == []
    check = StoreCheck(target.uri)
    assert check.store() == []
    assert [check.shard(shard) for shard in check.recorded] == [[]] * 3
    assert store.retired["row"].to_pylist() == sorted(OUT)
    assert restore(target, OUT) == 0
    restore_all(target)
    assert FeatureStore(target.uri).retired["row"].to_pylist() == sorted(OUT)
    retire(target, [1], "another")
    restore_all(target)
    assert store.rows_with_features.tolist() == IN_USE


def test_nothing_of_a_retired_row_is_copied(tmp_path: Path) -> None:
    """Neither features, nor the image that guides them, nor its embedding: a merge is how they are got rid of."""
    kind = Kind(compact=True, embedding=True)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    make_part(one, 9, 4, kind, seed=1)
    make_part(other, 6, 4, kind, seed=2)
    gone = {uri: FeatureStore(uri).rows_with_features[1::2].tolist() for uri in (one, other)}
    assert all(gone.values())
    for uri, rows in gone.items():
        retire(Objects(uri), rows, "consent withdrawn")
    target = Objects(str(tmp_path / "merged"))
    merge(joined([one, other], target.uri), target, resume=False, threads=2)
    store, rows = FeatureStore(target.uri), {*gone[one], *(9 + row for row in gone[other])}
    statuses, errors = (store.index[name].to_pylist() for name in ("status", "error"))
    assert {row for row, status in enumerate(statuses) if status == "retired"} == rows
    assert {errors[row] for row in rows} == {"consent withdrawn"}
    for shard in range(store.layout.shards):
        first = shard * store.layout.shard_rows
        data = target.get(layout.shard_key(shard, layout.GUIDANCE))
        images = layout.unpack_shard_index(data, store.layout.shard_rows, index_first=True)
        features = layout.unpack_shard_index(target.get(layout.shard_key(shard)), store.layout.shard_rows)
        vectors = layout.decode_values(target.get(layout.shard_key(shard, layout.EMBEDDING)), "float16", (4, -1))
        for row in rows & {*store.layout.rows_of(shard)}:
            assert images[row - first] is None
            assert features[row - first] is None
            assert np.isnan(vectors[row - first]).all()
    assert {*store.retired["row"].to_pylist()} == rows
    assert problems(store) == []
    check = StoreCheck(target.uri)
    assert check.store() == []
    assert [problem for shard in check.recorded for problem in check.shard(shard)] == []


def test_a_merge_goes_on_without_retiring_anew(tmp_path: Path) -> None:
    """What is taken back into use in a merged store stays so when the command is repeated."""
    one, other, target = (str(tmp_path / name) for name in ("one", "other", "merged"))
    make_part(one, 9, 4, Kind(), seed=1)
    make_part(other, 6, 4, Kind(), seed=2)
    merge(joined([one, other], target), Objects(target), resume=False, threads=2)
    rows = FeatureStore(one).rows_with_features[:2].tolist()
    retire(Objects(one), rows, REASON)
    merge(joined([one, other], target), Objects(target), resume=True, threads=2)
    assert len(FeatureStore(target).retired) == 0


def test_a_conversion_is_not_continued_with_other_rows(tmp_path: Path) -> None:
    """The configuration of merged stores is that of the first part: it does not tell their rows."""
    stores = {}
    for name, parts in {"two": ("a", "b"), "others": ("a", "c"), "more": ("a", "b", "c")}.items():
        for part in parts:
            if not (tmp_path / part).exists():
                make_part(str(tmp_path / part), 6, 4, Kind(), seed=ord(part))
        target = Objects(str(tmp_path / name))
        merge(joined([str(tmp_path / part) for part in parts], target.uri), target, resume=False, threads=2)
        stores[name] = FeatureStore(target.uri)
    storage, converted = DenseStorage("float16", 0, 4), Objects(str(tmp_path / "converted"))
    convert(stores["two"], converted, storage, resume=False, threads=2)
    before = {key: converted.get(key) for key in converted.list()}
    for name in ("others", "more"):
        with pytest.raises(JobError, match="is another one: it is made of other images"):
            convert(stores[name], converted, storage, resume=True, threads=2)
    assert {key: converted.get(key) for key in converted.list()} == before
    convert(stores["two"], converted, storage, resume=True, threads=2)
