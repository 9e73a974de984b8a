import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import JobError
from pipeline.features.pca import Basis, Moments, fit


def features(images: int = 6, channels: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(channels, channels, generator=generator)
    return torch.einsum("cd,bdhw->bchw", mixed, torch.randn(images, channels, 4, 5, generator=generator)) + 3


def moments(x: torch.Tensor) -> Moments:
    return Moments.of(x, torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool))


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4))
def test_merging_is_exact(cuts: list[int]) -> None:
    x = features()
    edges = sorted({0, 6, *cuts})
    merged = Moments.none(7)
    for first, end in itertools.pairwise(edges):
        merged = merged.merged(moments(x[first:end]))
    vectors = x.movedim(1, -1).reshape(-1, 7).double().numpy()
    assert merged.count == len(vectors)
    assert np.allclose(merged.mean, vectors.mean(0), rtol=1e-12)
    assert np.allclose(merged.scatter / len(vectors), np.cov(vectors.T, bias=True), rtol=1e-10)


def test_masked_vectors_do_not_count() -> None:
    x = features()
    valid = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    spoiled = torch.where(valid[:, None], x, torch.nan)
    kept = Moments.of(spoiled, valid)
    assert kept.count == int(valid.sum())
    assert np.allclose(kept.mean, x.movedim(1, -1)[valid].double().mean(0).numpy())
    assert Moments.of(x, torch.zeros(6, 4, 5, dtype=torch.bool)).count == 0


def test_basis_is_orthonormal_sorted_and_signed() -> None:
    basis = fit(moments(features()), 5)
    assert np.allclose(basis.components @ basis.components.T, np.eye(5), atol=1e-6)
    assert (np.diff(basis.explained_variance) <= 0).all()
    assert (basis.components[np.arange(5), np.abs(basis.components).argmax(1)] > 0).all()
    everything = fit(moments(features()), 7)
    assert np.isclose(everything.explained_variance_ratio.sum(), 1)
    vectors = features().movedim(1, -1).reshape(-1, 7).numpy()
    projected = (vectors - basis.mean) @ basis.components.T
    assert np.allclose(projected.var(0), basis.explained_variance, rtol=1e-4)


def test_too_few_vectors_is_an_error() -> None:
    with pytest.raises(JobError, match="2 independent components in 3 feature vectors"):
        fit(moments(features(1)[:, :, :1, :3]), 5)
    with pytest.raises(JobError, match="0 independent"):
        fit(moments(torch.ones(2, 7, 3, 3)), 1)


def test_basis_survives_a_file() -> None:
    basis = fit(moments(features()), 4)
    again, provenance = Basis.from_npz(basis.to_npz({"images": "photos"}))
    assert again.digest == basis.digest
    assert provenance == {"images": "photos"}
    assert basis.truncated(2).digest != basis.digest
    with pytest.raises(JobError, match="only 4"):
        basis.truncated(5)
    with pytest.raises(ValueError, match="not a basis"):
        Basis.from_npz(b"PK\x03\x04 nothing")
