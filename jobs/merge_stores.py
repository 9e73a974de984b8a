"""Make one store of several that were made with equal options.

    python -m jobs.upsample_imagenet --images others/ --store more/ --like features/
    python -m jobs.merge_stores --stores features/ more/ --output merged/

The rows of the first store come first, then those of the second, and so on. They are copied as they are: neither the
images nor the backbone are needed. The stores must have the same basis and quantization steps, which ``--like`` gives
to a new store. The result is a store like any other: it can be appended to, verified, and repaired.
"""

import logging
from dataclasses import dataclass

from jobs.command_line import DONE, run
from schemas.checks import at_least, check_shard_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Options of the merge."""

    # Folders or URIs of the stores to merge, in the order of their rows. They must be finished. One alone is copied,
    # for example with other --shard-images.
    stores: tuple[str, ...]
    # Folder or URI of the store to write.
    output: str
    # Continue a merge.
    resume: bool = False
    # Number of requests at the same time, for parts of one shard.
    threads: int = 4
    # Images per shard; if omitted, as in the first store.
    shard_images: int | None = None
    # Accept keys that are in several stores. Such rows can be read by their numbers only.
    allow_duplicate_keys: bool = False

    def __post_init__(self) -> None:
        """Check the options that need no access to files."""
        if not self.stores:
            raise ValueError("--stores names the stores to merge: got none")
        check_shard_images(self.shard_images)
        at_least("--threads", self.threads, 1)


def merge(config: MergeConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store, or it is damaged.
        JobError: the stores cannot be merged, or are not finished; there is another store at the output, or another job
            is writing that one.
    """
    from densefeat.storage.objects import Objects
    from pipeline.io.storage import check_writable, storage_explained
    from pipeline.store.converting.joining import joined
    from pipeline.store.converting.merge import merge
    from pipeline.store.converting.places import store_at
    from pipeline.store.lease import Lease

    whole = joined(
        config.stores,
        config.output,
        shard_rows=config.shard_images,
        allow_duplicate_keys=config.allow_duplicate_keys,
    )
    target = Objects(config.output)
    with storage_explained(target.uri):
        store_at(target, resume=config.resume)
    check_writable(target, f"--output {config.output}")
    with storage_explained(target.uri), Lease(target, None):
        shards = merge(whole, target, resume=config.resume, threads=config.threads)
    logger.info(
        "%s: %d rows in %d shards, of %d stores", config.output, len(whole.references), shards, len(whole.parts)
    )
    return DONE


if __name__ == "__main__":
    run(MergeConfig, merge, __doc__ or "", interrupted="continue with --resume")
