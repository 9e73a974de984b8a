"""What the benchmark of failures draws and compares: it must find what differs, or its runs say nothing."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.chaos.compare import differences
from benchmarks.chaos.photographs import make_photographs
from benchmarks.chaos.schedule import KINDS, SCENARIOS, draw, shortened
from pipeline.images.sample import sample_rows


def index(**changed: Any) -> bytes:
    """Of three rows; ``changed``: a column and its values."""
    columns = {"row": [0, 1, 2], "status": ["ok", "crashed", "corrupt"], "error": [None, "its worker died", "cut"]}
    buffer = io.BytesIO()
    pq.write_table(pa.table({**columns, **changed}), buffer)
    return buffer.getvalue()


STORE = {"zarr.json": b"{}", "features/c/0": b"codes", "index.parquet": index(), "_ledger/000000.parquet": b"then"}
QUIET = {**STORE, "index.parquet": index(status=["ok", "corrupt", "corrupt"], error=[None, "no image", "cut"])}


def test_a_store_of_the_same_bytes_has_no_differences() -> None:
    assert differences({**STORE, "_ledger/000000.parquet": b"now", "_reports/x.json": b""}, QUIET, {1}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features/c/0": b"other"}, "features/c/0 has other bytes"),
        ({"features/c/1": b"more"}, "features/c/1 is not in the undisturbed store"),
        ({"zarr.json": b"{ }"}, "zarr.json has other bytes"),
        ({"index.parquet": index(status=["ok", "pending", "corrupt"])}, "row 1 is pending"),
        ({"index.parquet": index(status=["ok", "ok", "corrupt"])}, "row 1 has poison, and is ok"),
        ({"index.parquet": index(error=[None, None, "cut"])}, "row 1 is crashed, with the reason None"),
        ({"index.parquet": index(error=[None, "", "another"])}, "row 2: error is 'another', not 'cut'"),
        ({"index.parquet": index(status=["crashed", "crashed", "corrupt"], error=["x"] * 3)}, "row 0: status"),
        ({"index.parquet": index(row=[0, 1, 3])}, "row 2: row is 3, not 2"),
        ({"index.parquet": index(more=[1, 2, 3])}, "other columns or rows"),
    ],
)
def test_each_difference_is_found(change: dict[str, bytes], words: str) -> None:
    assert any(words in found for found in differences({**STORE, **change}, QUIET, {1}))


def test_what_is_missing_is_found() -> None:
    missing = {key: data for key, data in STORE.items() if key != "features/c/0"}
    assert differences(missing, QUIET, {1}) == ["features/c/0 is missing"]


def test_a_seed_draws_the_same_faults_again() -> None:
    faults = draw(SCENARIOS["all"], 150, 3)
    assert faults == draw(SCENARIOS["all"], 150, 3)
    assert faults != draw(SCENARIOS["all"], 150, 4)
    assert len(faults) >= 100
    assert {fault.kind for fault in faults} == set(KINDS)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert all(0 < fault.at < 150 for fault in faults)
    assert {fault.kind for fault in draw(shortened(SCENARIOS["all"]), 40, 3)} == set(KINDS)


def test_photographs_are_all_different_and_poison_lies_outside_of_the_samples() -> None:
    made = make_photographs(200, poison=3, corrupt=True, seed=1)
    whole = [data for row, data in enumerate(made.files.values()) if row not in made.corrupt]
    assert len(set(whole)) == len(whole)
    assert not {*made.poison} & {*sample_rows(200, 64)}
    assert len(made.corrupt) == 10
    assert len(set(made.corrupt.values())) == 5
    names = [f"{row:05}.jpg" for row in made.poison]
    for name in names:
        assert len(made.files[name]) == len(made.undisturbed[name])
        Image.open(io.BytesIO(made.files[name])).load()  # an image, but for the decoder of the cluster
        with pytest.raises(OSError, match="cannot identify"):
            Image.open(io.BytesIO(made.undisturbed[name]))
    assert {name for name in made.files if made.files[name] != made.undisturbed[name]} == {*names}
