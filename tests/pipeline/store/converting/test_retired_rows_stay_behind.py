"""Rows that are out of use stay behind when a store is converted or merged."""

from pathlib import Path

import numpy as np

from densefeat import FeatureStore, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from pipeline.store.converting.convert import DenseStorage, convert
from pipeline.store.converting.joining import joined
from pipeline.store.converting.merge import merge
from pipeline.store.retirement import restore_all, retire
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
