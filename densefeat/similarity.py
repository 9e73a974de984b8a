"""Cosine similarity of stored features with vectors of the backbone's channels, and files of named vectors."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from densefeat.arguments import vectors_of
from densefeat.errors import DensefeatError
from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place

__all__ = ["Directions", "NamedVectors", "blocks", "products", "squared_lengths"]

Floats = npt.NDArray[np.float32]
_BLOCK = 4096  # pixels converted to float32 at a time: in cache, and too few for BLAS to wake its threads
_SHOWN = 5


@dataclass(frozen=True)
class Directions:
    """Vectors of backbone channels, as far as their cosine similarity with stored features depends on them.

    A pixel with the components f has the channels x = componentsᵀ f + mean (`FeatureStore.reconstruct`). With a vector
    v of length 1, x · v = f · (components v) + mean · v. The components are orthonormal, so that |x|² = |f|² + 2 f ·
    (components mean) + |mean|². No C channels are computed.

    Attributes:
        weights: [Q, k] float32, components v.
        offsets: [Q] float32, mean · v.
        shift: [k] float32, components mean.
        constant: |mean|².
    """

    weights: Floats
    offsets: Floats
    shift: Floats
    constant: float

    @classmethod
    def of(cls, vectors: npt.NDArray[np.float64], components: Floats, mean: Floats) -> "Directions":
        """Project vectors [Q, C], none of length 0, on a basis: components [k, C], mean [C]."""
        exponents = np.frexp(np.abs(vectors).max(axis=1, keepdims=True))[1]
        vectors = np.ldexp(vectors, -exponents)  # squares of extreme numbers would overflow
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        basis, centre = components.astype(np.float64), mean.astype(np.float64)
        weights, offsets, shift = unit @ basis.T, unit @ centre, basis @ centre
        narrow = [array.astype(np.float32) for array in (weights, offsets, shift)]
        return cls(narrow[0], narrow[1], narrow[2], float(centre @ centre))

    def cosines(self, codes: npt.NDArray[Any], step: Floats | None) -> Floats:
        """Cosine similarity of each pixel with each vector.

        Args:
            codes: [k, pixels] as stored.
            step: [k], to multiply codes with; None for float16.

        Returns:
            [Q, pixels] float32, −1 … 1; 0 where all channels are 0, NaN where the features are not finite.
        """
        step = np.ones(len(codes), np.float32) if step is None else step
        with np.errstate(invalid="ignore"):  # of features that are not finite
            squares = squared_lengths(codes, step, self.shift, self.constant)
            inverse = np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares != 0)
            found = (products(self.weights * step, codes) + self.offsets[:, None]) * inverse
            return np.clip(found, -1, 1, out=found)


def products(weights: Floats, codes: npt.NDArray[Any]) -> Floats:
    """Products of vectors [Q, k] with stored values [k, pixels]: [Q, pixels] float32."""
    found = np.empty((len(weights), codes.shape[1]), np.float32)
    for pixels in blocks(codes.shape[1]):
        found[:, pixels] = weights @ codes[:, pixels].astype(np.float32)
    return found


def squared_lengths(
    codes: npt.NDArray[Any], step: Floats, shift: Floats | None = None, constant: float = 0.0
) -> Floats:
    """Squared lengths of features f = codes × step: |f|² + 2 f · ``shift`` + ``constant``, at least 0.

    Args:
        codes: [k, pixels] as stored.
        step: [k].
        shift: [k]; None: 0.
        constant: see above.

    Returns:
        [pixels] float32.
    """
    squares = np.empty(codes.shape[1], np.float32)
    for pixels in blocks(codes.shape[1]):
        values = codes[:, pixels].astype(np.float32) * step[:, None]
        squares[pixels] = np.einsum("kp,kp->p", values, values)
        if shift is not None:
            squares[pixels] += 2 * (shift @ values) + np.float32(constant)
    return np.maximum(squares, 0, out=squares)


def blocks(pixels: int) -> Iterator[slice]:
    """Slices of at most `_BLOCK` pixels that cover all."""
    return (slice(start, start + _BLOCK) for start in range(0, pixels, _BLOCK))


@dataclass(frozen=True)
class NamedVectors:
    """Vectors with names, such as embeddings of texts by the text encoder that belongs to a backbone.

    Attributes:
        names: all different.
        vectors: [Q, C] float64, finite, none of length 0.
    """

    names: tuple[str, ...]
    vectors: npt.NDArray[np.float64]

    @classmethod
    def read(cls, place: str) -> "NamedVectors":
        """Read an ``.npz`` file with the arrays ``names`` [Q] and ``vectors`` [Q, C], or with one array [C] per name.

        Args:
            place: path or URI of the file.

        Raises:
            DensefeatError: it is no such file: a name is missing, empty or there twice, or a vector is not finite, of
                another length or without direction.
            OSError: there is no such file, or it cannot be read.
            StorageUnavailable: the storage does not answer.
        """
        folder, name = split_place(place)
        data = Objects(folder).get(name)
        try:
            loaded = np.load(io.BytesIO(data), allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("it is one array, without names")
            return cls._of({key: loaded[key] for key in loaded.files})
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DensefeatError(
                f"{place}: got no vectors with names ({error}), expected an .npz file with the arrays names [Q] and "
                "vectors [Q, C], or with one array [C] per name. Write one with numpy.savez"
            ) from error

    @classmethod
    def _of(cls, arrays: dict[str, npt.NDArray[Any]]) -> "NamedVectors":
        if arrays.keys() == {"names", "vectors"}:
            names, vectors = arrays["names"], arrays["vectors"]
            if names.dtype.kind != "U" or names.ndim != 1:
                raise ValueError(f"names is an array {list(names.shape)} of {names.dtype}, not [Q] of strings")
            if vectors.ndim != 2 or len(vectors) != len(names):
                raise ValueError(f"there are {len(names)} names, and vectors has the shape {list(vectors.shape)}")
        else:
            names = np.array(list(arrays), dtype=str)
            if len({one.shape for one in arrays.values()}) > 1 or any(one.ndim != 1 for one in arrays.values()):
                shapes = [f"{name} {list(one.shape)}" for name, one in arrays.items()][:_SHOWN]
                raise ValueError(f"its arrays are not all [C]: {', '.join(shapes)}")
            vectors = np.stack(list(arrays.values())) if arrays else np.empty((0, 0))
        texts = tuple(str(name) for name in names)
        if not texts or not all(texts):
            raise ValueError("a name is empty" if texts else "it is empty")
        if twice := sorted({name for name in texts if texts.count(name) > 1}):
            raise ValueError(f"names are there twice: {', '.join(twice[:_SHOWN])}")
        return cls(texts, vectors_of(vectors, vectors.shape[1], texts))
