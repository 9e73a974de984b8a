"""Carry out a plan: make the missing shards on workers, and finish the store when none is missing."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

from densefeat.errors import DensefeatError
from densefeat.rows.ledger import recorded_shards
from densefeat.storage.metadata import read_layout, read_root
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.io.storage import storage_explained
from pipeline.reporting.report import Report
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.make_shards import make_shards
from pipeline.run.planning.plan import Plan
from pipeline.run.preparation.prepare import prepare
from pipeline.run.queue import OUTAGE_S
from pipeline.run.ray.early import EarlyWorkers
from pipeline.run.recipe import Stages
from pipeline.run.shard_worker import make_worker
from pipeline.run.workers import InlineWorkers, Workers
from pipeline.store.appending.growth import begun_growth, grow
from pipeline.store.layout import existing_store, finish, reopen
from pipeline.store.lease import Lease
from pipeline.store.reports import keep_card, keep_report
from pipeline.store.shard import finished_shards
from pipeline.store.space import check_space, check_space_for_rest
from schemas.ledger import LedgerRecord
from schemas.options import FeatureConfig

logger = logging.getLogger(__name__)

_FREE_SOME = "free some, and run the same command again"


def carry_out(plan: Plan, started: float, early: EarlyWorkers | None = None) -> Report:
    """Make the missing shards of the store, and finish the store when none is missing.

    Args:
        plan: the job's plan.
        started: ``time.monotonic()`` when the job began, for the report.
        early: workers that were started while the job was planned.

    Raises:
        JobError: another job is making the same shards; or as in `prepare` and `make_shards`.
        KeyboardInterrupt: the job was interrupted; the message says what is kept and how to continue.
    """
    objects = Objects(plan.config.store)
    state = _JobState()
    try:
        with _leased(plan, objects) as lease:
            _append(plan, objects, lease)
            _make_missing(plan, objects, lease, state, early)
            report = _report(plan, objects, state, started)
            if report.complete:
                finish(objects, report.records)
                lease.clear()
                keep_card(objects)
            if report.made or report.given_up:
                keep_report(objects, report.to_dict())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_kept(plan, objects, set_up=state.set_up)) from None
    return report


@contextmanager
def _leased(plan: Plan, objects: Objects) -> Iterator[Lease]:
    """Hold a lease on the shards of a job; on all, if it deletes a store."""
    with ExitStack() as stack:
        everything = plan.config.overwrite or plan.growth is not None
        with storage_explained(objects.uri):
            lease = stack.enter_context(Lease(objects, None if everything else plan.shards))
        yield lease


def _append(plan: Plan, objects: Objects, lease: Lease) -> None:
    """Append the rows of a plan; the store must have those that the plan is about.

    Raises:
        JobError: another job appended rows, or began to, since the job was planned.
    """
    if not (plan.config.continues and plan.stored and plan.stored.setup_complete):
        return
    with storage_explained(objects.uri):
        if plan.growth is not None:
            store = FeatureStore(objects.uri)
            row_nbytes = store.nbytes / max(1, len(store.rows_with_features))
            check_space(objects, row_nbytes * plan.growth.rows_added, _FREE_SOME)
            grow(objects, plan.growth, lease.check)
            logger.info("%s images appended: %s rows", f"{plan.growth.rows_added:,}", f"{plan.features.rows:,}")
        elif begun_growth(objects) or read_layout(objects, read_root(objects)).rows != plan.features.rows:
            raise JobError(f"{objects.uri}: another job appended images in the meantime: run the same command again")


@dataclass
class _JobState:
    """Progress of a job: records of the shards done before and of those it made, and why shards were given up."""

    done: dict[int, LedgerRecord] = field(default_factory=dict)
    made: dict[int, LedgerRecord] = field(default_factory=dict)
    given_up: dict[int, str] = field(default_factory=dict)
    set_up: bool = False  # whether this job saw the store set up
    seconds: float = 0.0  # spent on making shards


def _make_missing(plan: Plan, objects: Objects, lease: Lease, state: _JobState, early: EarlyWorkers | None) -> None:
    config, stored = plan.config, plan.stored
    if config.continues and stored:
        state.done = finished_shards(objects, stored.hash)
    if state.done.keys() >= {*plan.shards}:
        return
    rows = sum(len(plan.features.rows_of(shard)) for shard in plan.shards if shard not in state.done)
    check_space_for_rest(objects, state.done.values(), rows, _FREE_SOME)
    with open_workers(
        plan.spec,
        plan.stages,
        config,
        attempts=config.attempts,
        stall_timeout_s=config.stall_timeout_s,
        outage_s=config.outage_patience_s,
        early=early,
    ) as workers:
        encoding = prepare(plan, objects, workers, lease.check)
        state.set_up, begun = True, time.monotonic()
        if config.continues and not (stored and stored.setup_complete):  # another job may have made shards meanwhile
            state.done = finished_shards(objects, encoding.configuration_hash)
        to_do = [shard for shard in plan.shards if shard not in state.done]
        if to_do:
            reopen(objects)
        known = state.done.values()
        state.made, state.given_up = make_shards(plan, objects, workers, encoding, to_do, known, lease.check)
        state.seconds = time.monotonic() - begun


def _report(plan: Plan, objects: Objects, state: _JobState, started: float) -> Report:
    config, attributes = plan.config, FeatureStore(plan.config.store).attributes
    records = {**state.done, **state.made}
    if config.shards:  # other jobs may have made other shards meanwhile
        records = finished_shards(objects, attributes["configuration_hash"])
    return Report(
        store=config.store,
        shards=plan.features.shards,
        own=plan.shards,
        records=[records[shard] for shard in sorted(records)],
        made=list(state.made),
        given_up=state.given_up,
        explained_variance=attributes["explained_variance"],
        seconds=time.monotonic() - started,
        making_seconds=state.seconds,
        keys=plan.references["key"],
        max_failed_share=config.max_failed_share,
        options=asdict(config),
    )


def what_is_kept(plan: Plan, objects: Objects, *, set_up: bool) -> str:
    """Message for the user who stopped the job: what the store holds, and how to continue.

    Args:
        plan: the job's plan.
        objects: the store. It is listed, because workers may have finished shards that the job does not know of.
        set_up: whether this job saw the store set up.
    """
    try:
        stored = existing_store(objects)
        finished = len(recorded_shards(objects, plan.features)) if stored else 0
    except (DensefeatError, OSError) as error:
        return f"the store cannot be read now ({error}): continue with --resume"
    if stored is None:
        return "nothing was stored: run the same command again"
    if not set_up and stored == plan.stored:
        return "the store is unchanged: run the same command again"
    if not finished:
        return "the store was started, but no shard is finished: continue with --resume"
    return f"{finished:,} of {plan.features.shards:,} shards are finished and kept; continue with --resume"


@contextmanager
def open_workers(
    spec: WorkerSpec,
    stages: Stages | None,
    config: FeatureConfig,
    *,
    attempts: int,
    stall_timeout_s: float,
    outage_s: float = OUTAGE_S,
    early: EarlyWorkers | None = None,
) -> Iterator[Workers]:
    """Open workers on the Ray cluster, or one in this process; they end with the context.

    Args:
        spec: spec of each worker.
        stages: stages of the spec's recipe, for a worker in this process; None: workers on Ray.
        config: the job's options: the number of workers, and the locations that they must be able to access.
        attempts: number of times that a task may fail.
        stall_timeout_s: a worker without progress for this long is replaced.
        outage_s: how long to wait for a storage that answers nobody.
        early: workers on the cluster that were requested with the same options; they end with their own context.
    """
    if stages is not None:
        with InlineWorkers(
            spec, attempts=attempts, outage_s=outage_s, make=partial(make_worker, stages=stages)
        ) as inline:
            yield inline
        return
    if early is not None and early.chosen is not None:
        yield early.chosen.build(spec)
        return
    from pipeline.run.ray import choose  # deferred: importing ray takes a second

    with choose.requested_workers(
        config, attempts=attempts, stall_timeout_s=stall_timeout_s, outage_s=outage_s
    ) as chosen:
        yield chosen.build(spec)
