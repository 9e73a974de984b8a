"""Read a store back, every byte, and compare it with what its ledger recorded.

    python -m jobs.verify_store --store features/

Exit code 0: whole; 1: damaged (repaired or not) or unfinished. ``--repair`` takes damaged shards out of the ledger, so
that the main job with ``--resume`` makes them anew, and rebuilds a damaged index or manifest from the ledger and, if
need be, from the list of images.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.command_line import DONE, FAILED, run
from pipeline.errors import JobError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Which store, and what to do about damage."""

    # The store to verify.
    store: str
    # Take damaged shards out of the ledger, so that --resume makes them anew; rebuild a damaged index or manifest.
    repair: bool = False
    # Shards read at the same time; each is held in memory whole.
    threads: int = 4

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1: got {self.threads}")


def verify(config: VerifyConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store, or its metadata is damaged.
        JobError: the index is to be rebuilt, and the images that the store was made of are not there.
    """
    from pipeline.store.verify import StoreCheck

    check = StoreCheck(config.store)
    damaged: dict[int, list[str]] = {}
    with ThreadPoolExecutor(config.threads) as pool:
        for shard, problems in zip(check.recorded, pool.map(check.shard, check.recorded), strict=True):
            if problems:
                damaged[shard] = problems
                logger.error("shard %d: %s", shard, "; ".join(problems))
    attributes, tables = check.attributes(), check.tables()
    general = [*attributes, *check.arrays(), *tables]
    for problem in general:
        logger.error("store: %s", problem)
    missing = check.layout.shards - len(check.recorded)
    logger.info(
        "%s: %d of %d shards recorded, %d damaged, %d not done; %.1f MB read",
        config.store, len(check.recorded), check.layout.shards, len(damaged), missing, check.nbytes / 1e6,
    )  # fmt: skip
    if config.repair:
        if attributes:
            raise JobError(
                f"{config.store}: nothing was repaired: {attributes[0]}. Without them, sound shards cannot be told "
                "from others: copy zarr.json from a copy of the store first"
            )
        _repair(config.store, list(damaged), tables=bool(tables))
    return FAILED if damaged or general or missing else DONE


def _repair(store: str, damaged: list[int], *, tables: bool) -> None:
    from densefeat.storage.objects import Objects
    from pipeline.store.repair import rebuild_tables, take_out

    objects = Objects(store)
    if tables:
        finished = rebuild_tables(objects, damaged)
        logger.info("rebuilt %s", "index and manifest" if finished else "the index; its shards are not all done")
    elif damaged:
        take_out(objects, damaged)
    if damaged:
        logger.info("removed from the ledger: run the main job with --resume to remake them")


if __name__ == "__main__":
    run(VerifyConfig, verify, __doc__ or "")
