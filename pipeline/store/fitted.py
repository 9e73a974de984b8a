"""The fit of an upsampler to the images of a store, read back from it."""

from densefeat import layout
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.upsamplers.fitting import UpsamplerFit
from schemas.configuration import FITTED, StoreConfiguration

__all__ = ["stored_fit"]

_ARRAYS = ("bias",)  # all that any upsampler stores
_DIGEST = "digest"


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
        raise JobError(f"the arrays of the upsampler in {store.uri} do not match its attributes: use --overwrite")
    return fit
