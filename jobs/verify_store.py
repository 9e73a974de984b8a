"""Read every byte of a store and compare it with the records in its ledger.

    python -m jobs.verify_store --store features/
    python -m jobs.verify_store --store features/ --fast     # sizes and metadata only: seconds

Exit code 0: complete and undamaged; 1: damaged (repaired or not) or unfinished. ``--repair`` deletes damaged shards and
their ledger records, so that the main job with ``--resume`` makes them again. It also rebuilds a damaged index or
manifest from the ledger and, if necessary, from the list of images.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.command_line import DONE, FAILED, run
from pipeline.errors import JobError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Options: the store to verify, and whether to repair it."""

    # Folder or URI of the store to verify.
    store: str
    # Delete damaged shards, so that --resume makes them again; rebuild a damaged index or manifest.
    repair: bool = False
    # Compare only the sizes of the objects with the ledger, not their bytes. Changed bytes are not found, but readers
    # refuse them by their checksums.
    fast: bool = False
    # Number of shards read at the same time; each is held in memory as a whole.
    threads: int = 4

    def __post_init__(self) -> None:
        """Check the options that need no access to files."""
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1: got {self.threads}")


def verify(config: VerifyConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store, or its metadata is damaged.
        JobError: the attributes are damaged, so nothing can be repaired; or the index cannot be rebuilt because the
            images that the store was made of are gone. Or a job is writing shards that are to be repaired.
    """
    from pipeline.store.verify import StoreCheck

    check = StoreCheck(config.store, fast=config.fast)
    damaged: dict[int, list[str]] = {}
    with ThreadPoolExecutor(config.threads) as pool:
        for shard, problems in zip(check.recorded, pool.map(check.shard, check.recorded), strict=True):
            if problems:
                damaged[shard] = problems
                logger.error("shard %d: %s", shard, "; ".join(problems))
    attributes, tables = check.attributes(), check.tables()
    general = [*attributes, *check.arrays(), *tables, *check.retired(), *check.reports()]
    for problem in general:
        logger.error("store: %s", problem)
    missing = check.layout.shards - len(check.recorded) + len(check.partial)
    logger.info(
        "%s: %d of %d shards recorded, %d damaged, %d not done; %.1f MB %s",
        config.store, len(check.recorded), check.layout.shards, len(damaged), missing, check.nbytes / 1e6,
        "by the sizes of the objects, which were not read" if config.fast else "read",
    )  # fmt: skip
    if config.repair:
        if attributes:
            raise JobError(
                f"{config.store}: nothing was repaired: {attributes[0]}. Without them, damaged shards cannot be "
                "identified: copy zarr.json from a copy of the store first"
            )
        _repair(config.store, list(damaged), tables=bool(tables))
    if check.growing or check.partial:
        logger.info("images are being appended, or a job that did this was stopped: --resume completes it")
    return FAILED if damaged or general or missing or check.growing else DONE


def _repair(store: str, damaged: list[int], *, tables: bool) -> None:
    from densefeat.storage.objects import Objects
    from pipeline.store.lease import Lease
    from pipeline.store.repair import rebuild_tables, take_out

    objects = Objects(store)
    if not tables and not damaged:
        return
    with Lease(objects, None):
        if tables:
            finished = rebuild_tables(objects, damaged)
            logger.info("rebuilt %s", "index and manifest" if finished else "the index; not all shards are done")
        else:
            take_out(objects, damaged)
    if damaged:
        logger.info("damaged shards deleted: run the job that made the store with --resume to make them again")


if __name__ == "__main__":
    run(VerifyConfig, verify, __doc__ or "")
