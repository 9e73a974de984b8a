"""Start Ray, and request the workers of a job, while the driver plans it.

The driver's plan imports timm and builds the backbone once, which takes seconds. Meanwhile Ray starts, nodes are asked
for, and workers import the same libraries on them.
"""

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from pipeline.run.resources import fits_this_process
from schemas.options import UpsampleConfig

if TYPE_CHECKING:
    from pipeline.run.ray.choose import ChosenWorkers

__all__ = ["EarlyWorkers"]

Plan = TypeVar("Plan")


class EarlyWorkers:
    """The workers of a job, started as soon as it is known that it needs Ray; they end with the context.

    Args:
        config: the job's options.

    Attributes:
        chosen: the workers; None: they are not started.
    """

    def __init__(self, config: UpsampleConfig) -> None:
        self._config = config
        self._entered = ExitStack()
        self.chosen: ChosenWorkers | None = None

    def __enter__(self) -> "EarlyWorkers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.close()

    def beside(self, plan: Callable[[Callable[[int], None]], Plan]) -> Plan:
        """Make a plan in a thread, and start the workers when it knows the number of images.

        Args:
            plan: called with a function that is to be called with this number, or not at all if there is nothing to do.

        Returns:
            What ``plan`` returns.

        Raises:
            JobError: Ray does not start, or cannot have the workers; or whatever ``plan`` raises.
            KeyboardInterrupt: the thread may still run.
        """
        if self._config.dry_run or self._config.worker_range == (0, 0):
            return plan(lambda images: None)
        if os.environ.get("RAY_ADDRESS"):  # the listing of a large dataset uses the cluster, too
            self._connect()
        known: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: the plan has ended
        planned: Future[Plan] = Future()
        planned.add_done_callback(lambda _: known.put(None))
        threading.Thread(target=_run, args=(planned, plan, known.put), name="plan", daemon=True).start()
        images = known.get()
        if images is not None and self._needs_ray(images):
            try:
                self._request()
            except Exception:
                with suppress(Exception):
                    planned.result()  # a process does not end well while a thread of it imports libraries
                raise
        return planned.result()

    def _needs_ray(self, images: int) -> bool:
        workers = self._config.worker_range
        if workers is None and self._config.shards:  # the number of images in a shard is not known yet
            return bool(os.environ.get("RAY_ADDRESS"))
        return not fits_this_process(workers, self._config.device, images)

    def _connect(self) -> None:
        from pipeline.run.ray import choose  # deferred: importing ray takes a second

        self._entered.enter_context(choose.connected())

    def _request(self) -> None:
        from pipeline.run.ray import choose

        config = self._config
        self.chosen = self._entered.enter_context(
            choose.requested_workers(
                config,
                attempts=config.attempts,
                stall_timeout_s=config.stall_timeout_s,
                outage_s=config.outage_patience_s,
            )
        )


def _run(planned: "Future[Plan]", plan: Callable[[Callable[[int], None]], Plan], known: Callable[[int], None]) -> None:
    try:
        planned.set_result(plan(known))
    except BaseException as error:
        planned.set_exception(error)
