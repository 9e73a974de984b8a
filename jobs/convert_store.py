"""Make a dense store of a compact one, or of a dense one with other quantization steps.

    python -m jobs.convert_store --store compact/ --output dense/

Any Zarr library reads the features of a dense store. Neither the images nor the backbone are needed; of failed images,
the reasons are kept.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from jobs.command_line import DONE, run
from schemas.checks import at_least, check_error_floor, check_shard_images
from schemas.options import ERROR_FLOOR, SHARD_IMAGES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of the conversion."""

    # Folder or URI of the store to convert, which must be finished.
    store: str
    # Folder or URI of the store to write.
    output: str
    # Data type of the stored features.
    dtype: Literal["int8", "float16"] = "int8"
    # int8 only: error floor common to all components, in units of their root mean square; if omitted, 0.1.
    error_floor: float | None = None
    # Images per shard; if omitted, 64 for int8, 8 for float16.
    shard_images: int | None = None
    # Continue a conversion.
    resume: bool = False
    # Number of images that are read and encoded at the same time.
    threads: int = 4

    def __post_init__(self) -> None:
        """Check the options that need no access to files."""
        check_error_floor(self.error_floor, self.dtype)
        check_shard_images(self.shard_images)
        at_least("--threads", self.threads, 1)


def convert(config: ConvertConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store, or it is damaged.
        JobError: it is not finished, there is another store at the output, or another job is writing that one.
    """
    from densefeat.storage.objects import Objects
    from densefeat.store import FeatureStore
    from pipeline.io.storage import check_writable, storage_explained
    from pipeline.store.converting.convert import DenseStorage, convert
    from pipeline.store.lease import Lease

    source, target = FeatureStore(config.store), Objects(config.output)
    check_writable(target, f"--output {config.output}")
    floor = ERROR_FLOOR if config.error_floor is None else config.error_floor
    storage = DenseStorage(config.dtype, floor, config.shard_images or SHARD_IMAGES[config.dtype])
    with storage_explained(target.uri), Lease(target, None):
        shards = convert(source, target, storage, resume=config.resume, threads=config.threads)
    logger.info("%s: %d shards, converted from %s", config.output, shards, config.store)
    return DONE


if __name__ == "__main__":
    run(ConvertConfig, convert, __doc__ or "", interrupted="continue with --resume")
