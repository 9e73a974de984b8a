"""Let the faults of a schedule strike a job that runs."""

import heapq
import itertools
import logging
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence

import psutil

from benchmarks.chaos.nodes import Node, Nodes
from benchmarks.chaos.schedule import Fault
from benchmarks.chaos.storage import Storage

__all__ = ["STALL_S", "Disturber"]

logger = logging.getLogger(__name__)

STALL_S = 30.0  # --stall-timeout-s of the job
_ANOTHER_NODE_S = 4.0
_REQUESTS = {"503": 8, "stall": 4, "hang": 2, "lose": 3}  # at most, of one fault
_LONGEST_STALL_S, _LONGEST_OUTAGE_S = 12.0, 10.0


class Disturber:
    """Strikes as the schedule says.

    Args:
        faults: to come, in order.
        nodes: of the cluster.
        storage: of the job.

    Attributes:
        struck: number of faults by kind.
    """

    def __init__(self, faults: Sequence[Fault], nodes: Nodes, storage: Storage) -> None:
        self._faults = list(faults)
        self._nodes, self._storage = nodes, storage
        self.struck: Counter[str] = Counter()
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def turn(self, driver: "subprocess.Popen[bytes]") -> None:
        """Strike with what is due now."""
        nodes = self._nodes.look()
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        done = len(self._storage.records)
        for fault in [fault for fault in self._faults if fault.at <= done]:
            if self._strike(fault, nodes, driver):
                self._faults.remove(fault)
                self.struck[fault.kind] += 1
                logger.info("%d shards done: %s", done, fault.kind)
                if fault.kind in ("kill a worker", "stop a worker", "kill a raylet", "switch off a node"):
                    nodes = self._nodes.look()

    def _strike(self, fault: Fault, nodes: list[Node], driver: "subprocess.Popen[bytes]") -> bool:
        """Let a fault strike; returns whether there was anything to strike."""
        if fault.kind in _REQUESTS:
            kind = f"stall-{1 + fault.size * (_LONGEST_STALL_S - 1):.1f}" if fault.kind == "stall" else fault.kind
            self._storage.spoil(kind, 1 + int(fault.pick * _REQUESTS[fault.kind]))
        elif fault.kind == "outage":
            self._storage.go_down(_LONGEST_OUTAGE_S * (1 + fault.size) / 2)
        elif fault.kind == "join with a wrong clock":
            self._nodes.add(3600 if fault.pick < 0.5 else -3600)
        elif fault.kind == "kill the driver":
            driver.send_signal(signal.SIGKILL)
        elif fault.kind in ("kill a worker", "stop a worker"):
            return self._strike_worker(fault, nodes)
        else:
            return self._strike_node(fault, nodes)
        return True

    def _strike_worker(self, fault: Fault, nodes: list[Node]) -> bool:
        workers = [worker for node in nodes if not node.clock_s for worker in node.workers() if _runs(worker)]
        if not workers:
            return False
        worker = workers[int(fault.pick * len(workers))]
        if fault.kind == "kill a worker":
            worker.kill()
        else:
            worker.suspend()
            self._in(STALL_S * (0.5 + fault.size), lambda: _resume(worker))  # before it is replaced, or after
        return True

    def _strike_node(self, fault: Fault, nodes: list[Node]) -> bool:
        nodes = [node for node in nodes if not node.clock_s and any(map(_runs, node.workers()))]
        if not nodes:
            return False
        node = nodes[int(fault.pick * len(nodes))]
        if fault.kind == "drain a node":
            seconds = 5 + int(10 * fault.size)
            answer = self._nodes.drain(node, seconds)
            assert answer.returncode == 0, answer.stdout + answer.stderr
            node.leaving = True
            self._in(seconds, lambda: self._replace(node))
        elif fault.kind == "kill a raylet":
            node.leaving = True
            for raylet in node.raylets():
                raylet.kill()
            self._in(_ANOTHER_NODE_S, lambda: self._replace(node))
        else:
            self._nodes.end(node)
            self._in(_ANOTHER_NODE_S, lambda: self._replace(node))
        return True

    def _replace(self, node: Node) -> None:
        self._nodes.end(node)
        self._nodes.add()

    def _in(self, seconds: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _resume(process: psutil.Process) -> None:
    if process.is_running():
        process.resume()
