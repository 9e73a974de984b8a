"""Connect to a Ray cluster, list its nodes, and interpret its errors."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from pipeline.errors import JobError
from pipeline.run.ray.tables import send_tables_as_streams
from pipeline.run.ray.token import ensure_token
from pipeline.run.resources import Node, Slot, available_cores

__all__ = [
    "connected",
    "free_resources",
    "is_death",
    "is_lost_node",
    "last_line",
    "living_nodes",
    "map_on_cluster",
    "room_for",
]

logger = logging.getLogger(__name__)

_WAITING_S = 30.0  # until a message says that no task has finished yet
_STALL_S = 3600.0
_DEATHS = (
    RayActorError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError, RuntimeEnvSetupError,
)  # fmt: skip


@contextmanager
def connected(*, dashboard: bool = False) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS (``ray job submit`` sets it), or start Ray on this machine.

    Within another such context, its connection is used. Otherwise it must be entered in the main thread, because Ray
    sets signal handlers.

    Args:
        dashboard: whether to start a dashboard with Ray; Ray Train queries it, and warns every second without it.

    Raises:
        JobError: the cluster does not answer, or Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    # Otherwise Ray logs a change of a default that does not affect us, and how it secures its own ports.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of the lines that workers log
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address="auto", logging_level=logging.ERROR)
        else:
            ensure_token()
            # Ray counts all cores of the machine, including those that this process may not use.
            ray.init(
                address="local",
                num_cpus=available_cores(),
                include_dashboard=dashboard,
                logging_level=logging.ERROR,
            )
    except SystemExit as error:  # Ray handles signals by itself until it has started
        if error.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    except Exception as error:  # RuntimeError, ConnectionError or an RPC error, depending on how far Ray got
        problem = f"the Ray cluster at RAY_ADDRESS={address} does not answer" if address else "Ray does not start"
        to_do = "Fix that"
        if address:  # the error is the same for a token that is refused, but Ray has logged that
            to_do = (
                "If lines above say InvalidAuthToken, set RAY_AUTH_MODE and RAY_AUTH_TOKEN as the cluster has them. "
                "Else fix or unset RAY_ADDRESS"
            )
        raise JobError(f"{problem}: {error}. {to_do}, or use --workers 0 to run without Ray") from error
    send_tables_as_streams()
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray installs a handler of its own, which prints a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def map_on_cluster(function: Callable[[Any], Any], items: Sequence[Any], *, stall_s: float = _STALL_S) -> Iterator[Any]:
    """Apply ``function`` to every item, each in a task on the cluster at RAY_ADDRESS; yields results in order.

    Args:
        function: a function that can be pickled, and can be called again if its worker is lost.
        items: its arguments.
        stall_s: how long to wait for the next result.

    Raises:
        JobError: no result came within ``stall_s``, or a task failed on the cluster itself.
        Exception: whatever ``function`` raises.
    """

    def applied(function: Callable[[Any], Any], item: Any) -> Any:  # nested, so that workers need not import this file
        return function(item)

    with connected():
        task = ray.remote(applied).options(num_cpus=1, scheduling_strategy="SPREAD", max_retries=5)
        shared = ray.put(function)
        calls = [task.remote(shared, item) for item in items]
        if not ray.wait(calls, timeout=_WAITING_S)[0]:
            logger.info("still listing the images; the cluster has %s free", free_resources())
        for item, call in zip(items, calls, strict=True):
            try:
                yield ray.get(call, timeout=stall_s)
            except RayTaskError as error:
                raise error.cause from None
            except GetTimeoutError as error:
                raise JobError(
                    f"listing the images on the cluster: no result for {item} within {stall_s:.0f} s; the cluster has "
                    f"{free_resources()} free. Check that it has a node with a CPU, and that storage answers"
                ) from error
            except RayError as error:
                raise JobError(f"listing the images on the cluster failed: {last_line(error)}") from error


def living_nodes() -> list[Node]:
    """The nodes of the cluster that are alive."""
    return [
        Node(node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> str:
    """CPUs and GPUs of the cluster that nobody uses."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def room_for(slot: Slot) -> int:
    """Number of workers for which the cluster has the resources free now."""
    free = ray.available_resources()
    parts = [(free.get("CPU", 0), slot.cpus), (free.get("GPU", 0), slot.gpus)]
    return min(int(there / wanted + 1e-9) for there, wanted in parts if wanted)


def is_death(error: RayError) -> bool:
    """Whether the error means that the actor is dead or unreachable; otherwise the call failed or its result is lost.

    `ActorUnavailableError` is included, as a subclass of `RayActorError`.
    """
    return isinstance(error, _DEATHS)


def is_lost_node(error: RayError, node: str | None) -> bool:
    """Whether an actor died because its node was lost.

    Args:
        error: the error that reports its death.
        node: the node that it was on; None if it was on none.
    """
    if isinstance(error, NodeDiedError) or getattr(error, "preempted", False):
        return True
    return node is not None and node not in {alive.name for alive in living_nodes()}


def last_line(error: BaseException) -> str:
    """Summarize an error in one line: the last line of a traceback, the first and last line of Ray's own errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, RayTaskError) or not isinstance(error, RayError) or len(lines) == 1:
        return lines[-1]
    return f"{lines[0]} {lines[-1]}"
