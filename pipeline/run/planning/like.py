"""Another store whose basis, quantization steps and upsampler's fit a job takes, so that the two can be merged."""

from dataclasses import dataclass, replace

from densefeat.errors import StoreError
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.run.planning.configuration import with_stored_defaults
from pipeline.store.fitted import Fitted, stored_fitted
from pipeline.store.layout import stored_attributes
from schemas.attributes import StoreAttributes, unlikenesses
from schemas.options import UpsampleConfig

__all__ = ["LikeStore", "check_like", "read_like", "with_defaults_like"]


@dataclass(frozen=True, eq=False)
class LikeStore:
    """The store of ``--like``.

    Attributes:
        attributes: its attributes.
        fitted: what was fitted to its images.
    """

    attributes: StoreAttributes
    fitted: Fitted


def read_like(uri: str) -> LikeStore:
    """Read what is fitted in a store, which may be unfinished.

    Raises:
        JobError: there is no store, it is still being set up, or it is damaged.
        StorageUnavailable: the storage does not answer.
    """
    try:
        store = FeatureStore(uri)
        attributes = stored_attributes(uri, store.attributes)
        return LikeStore(attributes, stored_fitted(store, attributes))
    except (JobError, StoreError) as error:
        raise JobError(f"--like {uri} cannot be read: {error}") from error


def with_defaults_like(config: UpsampleConfig, like: LikeStore) -> UpsampleConfig:
    """Options of a new store: those that are omitted are those of the other one."""
    configuration = like.attributes.configuration
    k = configuration.pca.components if config.components is None else config.components
    return replace(with_stored_defaults(config, configuration), components=k)


def check_like(like: LikeStore, attributes: StoreAttributes, config: UpsampleConfig) -> None:
    """Check that the store of a job can be merged with the one that it takes basis and steps from.

    Args:
        like: the latter.
        attributes: of the job's store, as planned.
        config: options of the job.

    Raises:
        JobError: it cannot; the message lists each difference.
    """
    if different := unlikenesses(like.attributes, attributes):
        raise JobError(
            f"--like {config.like}: that store has another configuration:\n  "
            + "\n  ".join(different)
            + "\nUse its options, so that the two can be merged; or take only its basis, with --pca"
        )
