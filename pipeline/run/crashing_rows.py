"""Find the images that make their shard fail: a decoder that crashes, an image that takes all the memory or never ends.

A shard that keeps failing is halved, and halved again, until single rows fail by themselves. They become failed rows,
and the rest of the shard is made. Each part runs alone on its worker, so that no other is blamed. A shard of which no
part fails was struck from outside, such as by workers that were killed: it is tried again as it is.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.run.failures import beyond_single_images
from pipeline.run.planning.plan import Plan
from pipeline.run.shard_worker import ShardWorker
from pipeline.run.workers import TaskFailed, Workers

__all__ = ["crashing_rows"]

logger = logging.getLogger(__name__)

_MOST_ROWS, _SHARE_OF_ROWS = 4, 0.125


def crashing_rows(
    plan: Plan, workers: Workers, encoding: Any, failed: Mapping[int, TaskFailed], made: int
) -> dict[int, dict[int, str]]:
    """Search shards for the rows that make them fail.

    Where many shards fail, or many rows of one, the images are not the reason: these are not searched further.

    Args:
        plan: the job's plan.
        workers: the workers.
        encoding: the store's encoding, as shared with the workers.
        failed: shard -> its failure.
        made: number of shards that this job made.

    Returns:
        shard -> position in the shard -> reason, for the shards that are to be tried again without these rows.
    """
    shards = [shard for shard, failure in failed.items() if failure.suspect]
    if beyond_single_images(len(shards), made):
        logger.warning("%d shards keep failing: too many to be the fault of single images", len(shards))
        return {}
    parts: list[tuple[int, range]] = []
    for shard in shards:
        every = range(len(plan.features.rows_of(shard)))
        logger.warning("shard %d keeps failing: looking for the images in it that make it fail", shard)
        parts += _halves(shard, every) if len(every) > 1 else [(shard, every)]
    found: dict[int, dict[int, str]] = {shard: {} for shard in shards}
    while parts:
        failures = _try(plan, workers, encoding, parts)
        parts = []
        for (shard, rows), reason in failures:
            if len(rows) == 1:
                found.setdefault(shard, {})[rows.start] = reason
            else:
                parts += _halves(shard, rows)
        parts = _without_hopeless(plan, parts, found)
    for shard, failing in found.items():
        if not failing:
            logger.warning("shard %d: nothing in it fails by itself: trying it again", shard)
    return found


def _try(
    plan: Plan, workers: Workers, encoding: Any, parts: Sequence[tuple[int, range]]
) -> list[tuple[tuple[int, range], str]]:
    """Which parts fail, and why: single rows only if they fail at every attempt."""
    failures = []
    for attempts, group in (
        (1, [part for part in parts if len(part[1]) > 1]),
        (plan.config.attempts, [part for part in parts if len(part[1]) == 1]),
    ):
        tasks = [(plan.rows_of_shard(shard, rows), encoding) for shard, rows in group]
        for task, result in workers.map(ShardWorker.try_rows, tasks, attempts=attempts, alone=True):
            if isinstance(result, TaskFailed) and result.suspect:
                failures.append((group[task], result.reason))
    return failures


def _halves(shard: int, rows: range) -> list[tuple[int, range]]:
    middle = len(rows) // 2
    return [(shard, rows[:middle]), (shard, rows[middle:])]


def _without_hopeless(
    plan: Plan, parts: list[tuple[int, range]], found: dict[int, dict[int, str]]
) -> list[tuple[int, range]]:
    """Drop shards in which too many rows fail, and what was found in them."""
    failing = Counter(shard for shard, _ in parts)  # two parts for each that failed
    for shard in {*failing, *found}:
        rows = len(plan.features.rows_of(shard))
        if failing[shard] / 2 + len(found.get(shard, ())) > max(_MOST_ROWS, _SHARE_OF_ROWS * rows):
            logger.warning("shard %d: many of its rows fail by themselves: the images are not the reason", shard)
            found.pop(shard, None)
            parts = [part for part in parts if part[0] != shard]
    return parts
