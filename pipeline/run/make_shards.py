"""Make the missing shards of a store on workers."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

from densefeat.storage.objects import Objects
from pipeline.reporting.progress import Progress
from pipeline.run.crashing_rows import crashing_rows
from pipeline.run.planning.plan import Plan
from pipeline.run.shard_worker import ShardWorker, StoreEncoding
from pipeline.run.workers import TaskFailed, Workers
from pipeline.store.blocks import BlockWriter
from schemas.ledger import LedgerRecord

__all__ = ["make_shards"]

logger = logging.getLogger(__name__)


class _ShardTasks(Sequence[tuple[Any, ...]]):
    """Arguments of `ShardWorker.make_shard` for each shard, made when they are sent: there may be a million.

    Args:
        crashed: shard -> rows that are not to be tried, and why.
    """

    def __init__(
        self,
        plan: Plan,
        objects: Objects,
        encoding: Any,
        shards: Sequence[int],
        crashed: Mapping[int, Mapping[int, str]] = MappingProxyType({}),
    ) -> None:
        self._plan, self._objects, self._encoding = plan, objects, encoding
        self._shards, self._crashed = shards, crashed

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, task: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, task: slice) -> Sequence[tuple[Any, ...]]: ...
    def __getitem__(self, task: int | slice) -> Any:
        if isinstance(task, slice):
            return [self[i] for i in range(len(self))[task]]
        shard = self._shards[task]
        references = self._plan.shard_references(shard)
        return self._objects, shard, references, self._encoding, dict(self._crashed.get(shard, {}))


def make_shards(
    plan: Plan,
    objects: Objects,
    workers: Workers,
    encoding: StoreEncoding,
    to_do: list[int],
    known: Collection[LedgerRecord],
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[int, LedgerRecord], dict[int, str]]:
    """Make the shards ``to_do``; returns the records of the shards made, and the reasons for those given up.

    A shard that keeps failing is searched for the images that make it fail, and made without them. ``check`` is called
    from time to time, and raises if the job is to end.
    """
    done = [record for record in known if record.shard in plan.shards]
    made: dict[int, LedgerRecord] = {}
    failed: dict[int, TaskFailed] = {}
    shared = workers.share(encoding)
    images = sum(len(plan.features.rows_of(shard)) for shard in plan.shards)
    blocks = BlockWriter(objects, plan.features.shards, known)
    show = _metrics(plan, len(done), workers)
    with Progress(len(plan.shards), images, done) as progress:

        def on_progress(images: int) -> None:
            check()
            progress.advance(images)
            show(len(made), len(failed))

        def make(shards: list[int], crashed: Mapping[int, Mapping[int, str]]) -> None:
            tasks = _ShardTasks(plan, objects, shared, shards, crashed)
            for task, result in workers.map(ShardWorker.make_shard, tasks, on_progress):
                if isinstance(result, TaskFailed):
                    failed[shards[task]] = result
                else:
                    failed.pop(shards[task], None)
                    made[shards[task]] = result
                    made.update((record.shard, record) for record in blocks.add(result) if record.shard in made)
                    progress.shard_done(result)

        make(to_do, {})
        if crashed := crashing_rows(plan, workers, shared, failed, len(made)):
            make(sorted(crashed), crashed)
    show(len(made), len(failed))
    reasons = {
        shard: f"tried {failure.attempts} times; the last time: {failure.reason}" for shard, failure in failed.items()
    }
    return made, reasons


def _metrics(plan: Plan, done: int, workers: Workers) -> Callable[[int, int], None]:
    """What shows the numbers of shards made and given up to the cluster's metrics; without Ray, nothing."""
    if plan.stages is not None:
        return lambda made, given_up: None
    from pipeline.run.ray.metrics import JobMetrics  # deferred: importing ray takes a second

    return JobMetrics(len(plan.shards), done, workers.count).show
