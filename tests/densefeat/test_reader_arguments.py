"""What callers pass to the reader: the right thing in any of its types, or an error that says what is wrong."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densefeat import FeatureStore, TorchFeatures
from densefeat.arguments import points_of, whole_number
from tests.helpers.stores import ROWS, H, K, KnownStore, W, make_store


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / "store"))


INTEGERS = [int, np.int8, np.uint8, np.int32, np.uint64, np.int64, np.array, torch.tensor]
NOT_INTEGERS = [
    2.7, 2.0, float("nan"), True, False, np.True_, np.float32(1.9), np.float64(2), np.array(2.0), np.array([2]),
    np.array(True), torch.tensor(2.0), torch.tensor(True), Decimal(2), 2j, None, b"class/000.jpg", (1,), [1],
    slice(0, 2), Path("class/000.jpg"),
]  # fmt: skip


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_row_may_be_any_integer(known: KnownStore, kind: Any) -> None:
    store = FeatureStore(known.uri)
    assert store.row_of(kind(3)) == 3
    assert np.array_equal(store.read(kind(3)), store.read(3))


@pytest.mark.parametrize("row", NOT_INTEGERS, ids=repr)
def test_anything_else_is_no_row(known: KnownStore, row: Any) -> None:
    store = FeatureStore(known.uri)
    several = isinstance(row, list | tuple | slice) or getattr(row, "shape", ()) == (1,)  # rows, for store.read
    readers = [store.row_of, store.read_codes, lambda row: store.sample(row, [[1, 1]]), store.read]
    for read in readers[:-1] if several else readers:
        with pytest.raises(TypeError, match="must be an integer: got"):
            read(row)
    with pytest.raises(TypeError, match="must be an integer: got"):
        TorchFeatures(store)[row]


@given(st.integers())
def test_rows_are_counted_from_either_end(known: KnownStore, row: int) -> None:
    store = FeatureStore(known.uri)
    if -ROWS <= row < ROWS:
        assert store.row_of(row) == list(range(ROWS))[row]
    else:
        with pytest.raises(IndexError, match=str(ROWS)):
            store.row_of(row)


@given(st.one_of(st.floats(), st.booleans(), st.complex_numbers(), st.text(), st.none(), st.fractions()))
def test_whole_numbers_are_never_made_of_other_things(value: Any) -> None:
    with pytest.raises(TypeError, match="a number must be an integer"):
        whole_number(value, "a number")


def test_keys_may_be_strings_of_numpy(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    assert store.row_of(np.str_("class/003.jpg")) == 3


def test_a_store_may_be_a_path(known: KnownStore) -> None:
    store = FeatureStore(Path(known.uri))
    assert store.uri == known.uri
    assert repr(store) == repr(FeatureStore(known.uri))
    for place in (Path(known.uri), known.uri, store):
        assert len(TorchFeatures(place)) == ROWS - 2
    for place in (None, 3, [known.uri]):
        with pytest.raises(TypeError):
            FeatureStore(place)  # type: ignore[arg-type]


@given(st.tuples(*[st.integers(-1, max(H, W) + 1)] * 4))
def test_a_box_is_a_part_or_an_error(known: KnownStore, box: tuple[int, int, int, int]) -> None:
    store = FeatureStore(known.uri)
    y0, x0, y1, x1 = box
    if 0 <= y0 < y1 <= H and 0 <= x0 < x1 <= W:
        whole = store.read(5)
        assert np.array_equal(store.read(5, box=box), whole[:, y0:y1, x0:x1])
        assert np.array_equal(store.read(5, box=np.array(box)), whole[:, y0:y1, x0:x1])
    else:
        with pytest.raises(ValueError, match="box"):
            store.read(5, box=box)


@pytest.mark.parametrize(
    "box", [(0, 0, 1.5, 3), (0, 0, True, 3), np.array([0, 0, 3.0, 3.0]), "0033", 3, (0, 0, None, 3)]
)
def test_a_box_of_other_things_is_a_type_error(known: KnownStore, box: Any) -> None:
    with pytest.raises(TypeError, match="box"):
        FeatureStore(known.uri).read(5, box=box)


@pytest.mark.parametrize("box", [(), (0, 0, 3), (0, 0, 3, 3, 1)])
def test_a_box_has_four_sides(known: KnownStore, box: Any) -> None:
    with pytest.raises(ValueError, match=f"four integers .* got {len(box)}"):
        FeatureStore(known.uri).read(5, box=box)


@pytest.mark.parametrize("points", [[], (), np.empty((0, 2)), np.empty((0, 2), np.float32), torch.empty(0, 2)])
@pytest.mark.parametrize("coordinates", ["features", "image"])
def test_no_points_give_no_features(known: KnownStore, points: Any, coordinates: str) -> None:
    features = FeatureStore(known.uri).sample(5, points, coordinates=coordinates)
    assert features.shape == (0, K)
    assert features.dtype == np.float32


@pytest.mark.parametrize(
    "kind", [list, np.array, torch.tensor, lambda p: np.array(p, np.uint8), lambda p: [tuple(p[0])]]
)
def test_points_may_be_any_numbers(known: KnownStore, kind: Any) -> None:
    store = FeatureStore(known.uri)
    assert np.array_equal(store.sample(5, kind([[3, 4]])), store.sample(5, [[3.0, 4.0]]))


@given(st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=8))
def test_points_are_finite_or_named(points: list[tuple[float, float]]) -> None:
    bad = [i for i, point in enumerate(points) if not np.isfinite(point).all()]
    if not bad:
        assert np.array_equal(points_of(points), np.array(points))
        return
    with pytest.raises(ValueError, match="must be finite") as caught:
        points_of(points)
    assert all(f"points_xy[{i}]" in str(caught.value) for i in bad[:5])


@pytest.mark.parametrize(
    ("points", "error"),
    [
        ([1, 2], ValueError),
        ([[1, 2, 3]], ValueError),
        ([[]], ValueError),
        (3, ValueError),
        (np.empty((0, 3)), ValueError),
        ([[1, 2], [3]], ValueError),
        ([["a", "b"]], TypeError),
        ([[None, 1]], TypeError),
        ([[1j, 1]], TypeError),
        ([[True, False]], TypeError),
    ],
)
def test_what_is_no_points(known: KnownStore, points: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        FeatureStore(known.uri).sample(5, points)


def test_far_points_take_the_border(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    corners = store.sample(5, [[-1e300, -1e300], [1e300, 1e300]])
    assert np.array_equal(corners, store.read(5)[:, [0, -1], [0, -1]].T)
