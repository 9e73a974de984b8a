"""PCA of the backbone's features: one basis for a whole dataset.

Moments are gathered in float64, batch by batch on any number of workers, and merged exactly (Chan, Golub, LeVeque
1979). Merging in the same order gives bit-identical results.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densefeat import layout
from densefeat.store import FeatureStore
from pipeline.errors import JobError

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean [C] and scatter [C, C] (sum of outer products about the mean) of feature vectors, float64."""

    count: int
    mean: Doubles
    scatter: Doubles

    @classmethod
    def none(cls, num_chs: int) -> "Moments":
        """Moments of an empty set."""
        return cls(0, np.zeros(num_chs), np.zeros((num_chs, num_chs)))

    @classmethod
    def of(cls, features: Tensor, valid: Tensor) -> "Moments":
        """Moments of the feature vectors in [B, C, h, w] where ``valid`` [B, h, w] is True."""
        vectors = features.movedim(1, -1)[valid].double()
        if len(vectors) == 0:
            return cls.none(features.shape[1])
        mean = vectors.mean(0)
        centred = vectors - mean
        return cls(len(vectors), mean.cpu().numpy(), (centred.T @ centred).cpu().numpy())

    def merged(self, other: "Moments") -> "Moments":
        """Moments of the union of both sets."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, scatter)


@dataclass(frozen=True)
class Basis:
    """A PCA basis.

    Attributes:
        mean: [C] float32.
        components: [k, C] float32, orthonormal rows in order of decreasing variance. In each row the entry of largest
            magnitude is positive, so that signs are reproducible.
        explained_variance: [k] float64, variance along each component.
        explained_variance_ratio: [k] float64, the same as shares of the total variance.
    """

    mean: npt.NDArray[np.float32]
    components: npt.NDArray[np.float32]
    explained_variance: Doubles
    explained_variance_ratio: Doubles

    @classmethod
    def of_store(cls, store: FeatureStore) -> "Basis":
        """The basis of a store's features."""
        variance, ratio = (
            store.array(f"{layout.PCA}/{name}", np.float64)
            for name in ("explained_variance", "explained_variance_ratio")
        )
        return cls(store.mean, store.components, variance, ratio)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of mean and components: what the features depend on."""
        sha = hashlib.sha256()
        for array in (self.mean, self.components):
            sha.update(f"{array.shape}".encode())
            sha.update(array.astype("<f4").tobytes())
        return sha.hexdigest()

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Mean and components as tensors."""
        # Copies: arrays from Ray's object store are read-only, which tensors do not support.
        return torch.tensor(self.mean), torch.tensor(self.components)

    def truncated(self, k: int) -> "Basis":
        """The first ``k`` components.

        Raises:
            JobError: the basis has fewer.
        """
        if k > len(self.components):
            raise JobError(f"--components {k}, but the basis has only {len(self.components)}: fit a larger one")
        return Basis(self.mean, self.components[:k], self.explained_variance[:k], self.explained_variance_ratio[:k])

    def explaining(self, share: float) -> int:
        """The smallest number of components that together explain a share (0 … 1) of the variance.

        Raises:
            JobError: all of them explain less.
        """
        explained = self.explained_variance_ratio.cumsum()
        if explained[-1] < share:
            raise JobError(
                f"--components {share}, but the {len(explained)} components of the basis explain "
                f"{explained[-1]:.3f} of the variance: fit a larger one"
            )
        return int(explained.searchsorted(share)) + 1

    def to_npz(self, provenance: dict[str, Any]) -> bytes:
        """Serialise to the bytes of a NumPy .npz file; ``provenance`` records what the basis was fitted on."""
        buffer = io.BytesIO()
        np.savez(buffer, **self.__dict__, provenance=np.array(json.dumps(provenance)))
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, data: bytes) -> tuple["Basis", dict[str, Any]]:
        """Read a basis and its provenance from the bytes of an .npz file.

        Raises:
            ValueError: not a file written by `to_npz`.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                names = ("mean", "components", "explained_variance", "explained_variance_ratio")
                return cls(*(arrays[name] for name in names)), json.loads(str(arrays["provenance"]))
        except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a basis made by jobs/fit_pca.py: {error}") from error


def fit(moments: Moments, components: float, *, at_most: bool = False) -> Basis:
    """Fit a basis of the components of largest variance.

    Args:
        moments: moments of the feature vectors.
        components: their number k (int), or the share of the variance that they are to explain (float, 0 … 1).
        at_most: return fewer components if the vectors, e.g. of a small sample, span fewer dimensions.

    Raises:
        JobError: the vectors span fewer than k dimensions; with ``at_most``, they do not vary at all.
    """
    # Divided by count, not count − 1: this also works for one vector, and variances are only compared.
    covariance = moments.scatter / max(moments.count, 1)
    values, vectors = np.linalg.eigh(covariance)  # ascending
    values, directions = values[::-1].clip(min=0), vectors[:, ::-1].T
    rank = int((values > values[0] * 1e-10).sum()) if values[0] > 0 else 0
    if isinstance(components, float):
        k = max(1, min(int((values.cumsum() / values.sum()).searchsorted(components)) + 1, rank)) if rank else 1
    else:
        k = int(components)
    if at_most:
        k = max(1, min(k, rank))
    if rank < k:
        advice = "give other images" if rank == 0 else f"use --components {rank} or less"
        raise JobError(
            f"PCA found {rank} independent components in {moments.count:,} feature vectors, fewer than --components "
            f"{k}: {advice}, or fit on more images"
        )
    strongest = np.abs(directions[:k]).argmax(1)
    signs = np.sign(directions[np.arange(k), strongest])
    return Basis(
        moments.mean.astype(np.float32),
        np.ascontiguousarray(directions[:k] * signs[:, None], dtype=np.float32),
        values[:k].copy(),
        values[:k] / values.sum(),
    )
