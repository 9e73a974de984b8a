"""Similarity of features with vectors of channels, and files of named vectors."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from densefeat import FeatureStore, MissingFeatures
from densefeat.errors import DensefeatError
from densefeat.similarity import Directions, NamedVectors, blocks
from tests.helpers.stores import FAILED_ROWS, C, H, K, W, basis, make_store


@pytest.fixture(scope="module", params=["int8", "float16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore(make_store(str(tmp_path_factory.mktemp("store") / "store"), request.param).uri)


def by_definition(store: FeatureStore, row: int, vectors: np.ndarray) -> np.ndarray:
    """Cosines with all C channels of each pixel, in float64."""
    channels = np.einsum("kc,khw->chw", store.components.astype(float), store.read(row).astype(float))
    channels += store.mean.astype(float)[:, None, None]
    products = np.einsum("qc,chw->qhw", vectors.astype(float), channels)
    return products / np.linalg.norm(vectors.astype(float), axis=1)[:, None, None] / np.linalg.norm(channels, axis=0)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64])
def test_it_is_the_cosine_of_reconstructed_channels(store: FeatureStore, count: int, kind: Any) -> None:
    vectors = (np.random.default_rng(count).normal(size=(count, C)) * 40).astype(kind)
    for row in (0, 7):
        expected = by_definition(store, row, vectors)
        found = store.similarity(row, vectors)
        assert (found.shape, found.dtype) == ((count, H, W), np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(store.similarity(row, vectors[0]), store.similarity(row, vectors[:1])[0])
    np.testing.assert_allclose(found, store.similarity("class/007.jpg", 1000 * vectors.astype(float)), atol=1e-6)


def test_with_itself_a_pixel_has_one(store: FeatureStore) -> None:
    vector = store.reconstruct(store.read(4)[:, 3, 6])
    found = store.similarity(4, vector)
    assert found[3, 6] == pytest.approx(1, abs=1e-6)
    assert found.max() <= 1
    assert store.similarity(4, -vector)[3, 6] == pytest.approx(-1, abs=1e-6)
    assert store.similarity(4, -vector).min() >= -1


def test_the_mean_takes_part(store: FeatureStore) -> None:
    """What is orthogonal to all components is like each pixel, as far as the mean is like it."""
    rest = store.mean - store.components.T @ (store.components @ store.mean)
    channels = store.reconstruct(store.read(0))
    expected = np.linalg.norm(rest) / np.linalg.norm(channels, axis=0)
    np.testing.assert_allclose(store.similarity(0, rest), expected, atol=1e-5)


def test_tensors_and_lists_are_vectors(store: FeatureStore) -> None:
    vector = np.arange(1, C + 1, dtype=np.float32)
    for same in (torch.from_numpy(vector), vector.tolist(), torch.from_numpy(vector).half()):
        np.testing.assert_array_equal(store.similarity(0, same), store.similarity(0, vector))
    assert store.similarity(0, np.zeros((0, C))).shape == (0, H, W)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [1e300, 1e-310, 5e-324])
def test_lengths_do_not_matter(store: FeatureStore, length: float) -> None:
    vector = np.eye(C)[3]
    np.testing.assert_allclose(store.similarity(0, length * vector), store.similarity(0, vector), atol=1e-6)
    both = store.similarity(0, np.stack([length * vector, vector]))
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize(("k", "c", "pixels"), [(1, 2, 1), (8, 64, 4097), (64, 384, 9000), (12, 12, 50)])
def test_sizes(k: int, c: int, pixels: int, scale: float) -> None:
    rng, known = np.random.default_rng(k), basis(k, c)
    codes = rng.integers(-127, 128, size=(k, pixels)).astype(np.int8)
    step, vectors = np.linspace(0.01, 0.1, k, dtype=np.float32), rng.normal(size=(3, c))
    found = Directions.of(vectors, known.components, scale * known.mean).cosines(codes, step)
    channels = known.components.astype(float).T @ (codes * step[:, None].astype(float)) + scale * known.mean[:, None]
    unit = channels / np.linalg.norm(channels, axis=0)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ unit
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_zeros_and_what_is_not_finite() -> None:
    known = replace(basis(2, 4), mean=np.zeros(4, np.float32))
    codes = np.array([[0, np.nan, np.inf, 1], [0, 1, 1, 2]], np.float16)
    found = Directions.of(np.ones((1, 4)), known.components, known.mean).cosines(codes, None)[0]
    assert found[0] == 0
    assert np.isnan(found[[1, 2]]).all()
    assert np.isfinite(found[3])


def test_blocks_cover_all_pixels() -> None:
    for pixels in (1, 4095, 4096, 4097, 10000):
        assert np.array_equal(np.concatenate([np.arange(pixels)[one] for one in blocks(pixels)]), np.arange(pixels))


@pytest.mark.parametrize(
    ("vectors", "error", "words"),
    [
        (np.ones(C + 1), ValueError, rf"vectors must be \[C={C}\] or \[Q, C={C}\]: got shape \[{C + 1}\]"),
        (np.ones((2, C - 1)), ValueError, "got shape"),
        (np.ones((C, 2)), ValueError, "got shape"),
        (np.ones((1, 2, C)), ValueError, "got shape"),
        (1.0, ValueError, r"got shape \[\]"),
        (np.zeros(C), ValueError, "vectors must be finite and not 0: got others for 0$"),
        (np.eye(2, C) * [[1], [0]], ValueError, "got others for 1$"),
        (np.full((9, C), np.nan), ValueError, "got others for 0, 1, 2, 3, 4 and 4 more"),
        (np.full(C, np.inf), ValueError, "finite"),
        (np.ones(C, complex), TypeError, "real numbers: got an array of complex128"),
        (np.ones(C, bool), TypeError, "real numbers"),
        (["dog"], TypeError, "real numbers"),
    ],
)
def test_other_vectors_are_refused(store: FeatureStore, vectors: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        store.similarity(0, vectors)


def test_rows_without_features_are_refused_as_in_reading(store: FeatureStore) -> None:
    vector = np.ones(C)
    with pytest.raises(MissingFeatures, match="truncated"):
        store.similarity(FAILED_ROWS[0], vector)
    with pytest.raises(IndexError):
        store.similarity(99, vector)
    with pytest.raises(KeyError):
        store.similarity("no.jpg", vector)
    with pytest.raises(TypeError):
        store.similarity([0], vector)  # type: ignore[arg-type]


# --- Files of named vectors ---


def written(file: Path, **arrays: Any) -> str:
    np.savez(file, **arrays)
    return str(file)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
def test_both_forms_of_a_file(tmp_path: Path, kind: Any) -> None:
    names, vectors = ["a dog", "図", "a/b"], np.random.default_rng(0).normal(size=(3, C)).astype(kind)
    table = NamedVectors.read(written(tmp_path / "a.npz", names=np.array(names), vectors=vectors))
    each = NamedVectors.read(written(tmp_path / "b.npz", **dict(zip(names, vectors, strict=True))))
    assert table.names == each.names == tuple(names)
    for one in (table, each):
        np.testing.assert_array_equal(one.vectors, vectors.astype(np.float64))


@pytest.mark.s3
def test_a_file_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    from densefeat.storage.objects import Objects

    data = Path(written(tmp_path / "a.npz", dog=np.ones(3))).read_bytes()
    Objects(s3_bucket).put("texts.npz", data)
    assert NamedVectors.read(f"{s3_bucket}/texts.npz").names == ("dog",)


ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"names": np.array(["a", "b"]), "vectors": np.ones((3, 3))}, r"2 names, and vectors has the shape \[3, 3\]"),
        ({"names": np.array(["a", "b"]), "vectors": np.ones(3)}, "2 names"),
        ({"names": np.array([1, 2]), "vectors": ONES}, r"names is an array \[2\] of int64, not \[Q\] of strings"),
        ({"names": np.array(["a", "a"]), "vectors": ONES}, "names are there twice: a"),
        ({"names": np.array(["a", ""]), "vectors": ONES}, "a name is empty"),
        ({"names": np.array(["a", None]), "vectors": ONES}, "allow_pickle=False"),
        ({"names": np.array([], str), "vectors": np.ones((0, 3))}, "it is empty"),
        ({}, "it is empty"),
        ({"a": np.ones(3), "b": np.ones(4)}, r"its arrays are not all \[C\]: a \[3\], b \[4\]"),
        ({"a": np.ones((1, 3))}, r"not all \[C\]: a \[1, 3\]"),
        ({"a": np.ones(3), "b": np.zeros(3)}, "finite and not 0: got others for 'b'"),
        ({"a": np.array([1, np.nan])}, "got others for 'a'"),
        ({"a": np.array(["x", "y"])}, "real numbers"),
        ({"a": np.ones(0)}, "C=0"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    file = written(tmp_path / "texts.npz", **arrays)
    with pytest.raises(DensefeatError, match=words) as caught:
        NamedVectors.read(file)
    assert "texts.npz: got no vectors with names" in str(caught.value)
    assert "numpy.savez" in str(caught.value)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = Path(written(tmp_path / "whole.npz", a=np.arange(1.0, 400), b=np.arange(1.0, 400))).read_bytes()
    single = io.BytesIO()
    np.save(single, np.ones((2, 3)))
    flipped = bytearray(whole)
    flipped[200] ^= 255
    for data in (b"", b"text", whole[: len(whole) // 2], bytes(flipped), single.getvalue()):
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(DensefeatError, match="got no vectors with names"):
            NamedVectors.read(str(tmp_path / "x.npz"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        NamedVectors.read(str(tmp_path / "nothing.npz"))


def test_the_components_of_the_helper_are_orthonormal() -> None:
    """On which `Directions` relies, as on those of a fitted basis."""
    components = basis(K, C).components.astype(float)
    np.testing.assert_allclose(components @ components.T, np.eye(K), atol=1e-6)
