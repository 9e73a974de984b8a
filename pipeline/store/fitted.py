"""What was fitted to the images of a store, read back from it: its basis, its steps, and its upsampler's fit."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.layout import step_sha256
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.upsamplers.fitting import UpsamplerFit
from schemas.attributes import StoreAttributes
from schemas.configuration import FITTED, StoreConfiguration

__all__ = ["Fitted", "stored_fit", "stored_fitted"]

_ARRAYS = ("bias",)  # all that any upsampler stores
_DIGEST = "digest"
_RESTORE = "restore it from a copy of the store, or use --overwrite"


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was fitted to the images of a store.

    Attributes:
        basis: PCA basis.
        step: quantization steps [k]; None for float16.
        upsampler: fit of the upsampler; None if it needs none.
    """

    basis: Basis
    step: npt.NDArray[np.float32] | None
    upsampler: UpsamplerFit | None


def stored_fitted(store: FeatureStore, attributes: StoreAttributes) -> Fitted:
    """What was fitted to the images of a store, checked against its attributes.

    Raises:
        JobError: the arrays do not match the attributes.
        StoreError: an array is missing or damaged.
    """
    basis, step = Basis.of_store(store), store.step
    if basis.digest != attributes.configuration.pca.basis:
        raise JobError(f"the PCA basis in {store.uri} does not match its attributes: {_RESTORE}")
    if step_sha256(step) != attributes.step_sha256:
        raise JobError(f"the quantization steps in {store.uri} do not match its attributes: {_RESTORE}")
    return Fitted(basis, step, stored_fit(store, attributes.configuration))


def stored_fit(store: FeatureStore, configuration: StoreConfiguration) -> UpsamplerFit | None:
    """The fit in a store; None if its upsampler was not fitted to the images.

    Raises:
        JobError: the arrays do not match the configuration.
        StoreError: an array is missing or damaged.
    """
    known = configuration.upsampler.get(FITTED)
    if known is None:
        return None
    settings = {name: value for name, value in known.items() if name != _DIGEST}
    fit = UpsamplerFit(settings, {name: store.array(f"{layout.UPSAMPLER}/{name}") for name in _ARRAYS})
    if fit.identity() != known:
        raise JobError(f"the arrays of the upsampler in {store.uri} do not match its attributes: {_RESTORE}")
    return fit
