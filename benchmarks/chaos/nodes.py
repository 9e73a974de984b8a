"""Nodes of a Ray cluster on this machine, as trees of processes that can be killed and stopped from outside."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.pipeline.run.cluster.ray_clusters import RAY, SHARING_A_MACHINE, LocalCluster

__all__ = ["Node", "Nodes", "build_wrong_clock"]

_HERE = Path(__file__).parent
_STORE_BYTES = 100_000_000  # of Ray's object store, which holds little here


@dataclass
class Node:
    """A node, from its start to its end.

    Attributes:
        number: in the order in which nodes were started.
        process: ``ray start``.
        clock_s: how far its clock is off.
        seen: processes that were below it, by their id: those that outlive it have lost their parents.
    """

    number: int
    process: "subprocess.Popen[bytes]"
    clock_s: int = 0
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    leaving: bool = False

    @property
    def id(self) -> str | None:
        """Ray's name for it; None as long as it has none."""
        found = [re.search(r"--node_id=(\w+)", " ".join(_command(process))) for process in self.raylets()]
        return found[0][1] if found and found[0] else None

    def raylets(self) -> list[psutil.Process]:
        """Its main process."""
        return [process for process in self.living() if Path(_command(process)[0]).name == "raylet"]

    def workers(self) -> list[psutil.Process]:
        """Processes of the job's workers."""
        return [process for process in self.living() if "WorkerActor" in " ".join(_command(process))]

    def living(self) -> list[psutil.Process]:
        """Its processes."""
        return [process for process in self.seen.values() if process.is_running()]


class Nodes:
    """The nodes besides the head.

    Args:
        cluster: the head.
        environment: of all their processes, besides the cluster's.
        wrong_clock: the library that moves clocks, as `build_wrong_clock` makes it.
        log: file for what ``ray start`` says.
    """

    def __init__(
        self, cluster: LocalCluster, environment: Mapping[str, str], wrong_clock: Path | None, log: Path
    ) -> None:
        self._cluster, self._environment = cluster, {**cluster.environment, **environment}
        self._wrong_clock, self._log = wrong_clock, log
        self.all: list[Node] = []

    def add(self, clock_s: int = 0) -> Node:
        """Start a node with one CPU; it joins the cluster some seconds later."""
        clock = {}
        if clock_s:
            assert self._wrong_clock is not None
            clock = {"LD_PRELOAD": str(self._wrong_clock), "WRONG_CLOCK_S": str(clock_s)}
        command = [
            *RAY, "start", f"--address={self._cluster.address}", "--block", "--num-cpus=1",
            f"--object-store-memory={_STORE_BYTES}", *SHARING_A_MACHINE,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, env={**self._environment, **clock}, stdout=log, stderr=log)
        self.all.append(Node(len(self.all), process, clock_s))
        return self.all[-1]

    def look(self) -> list[Node]:
        """Find the processes of all nodes; returns the nodes that live and are not about to leave."""
        everybody = {process.pid: process for process in psutil.process_iter(["ppid"])}
        for node in self.all:
            below = {node.process.pid, *(process.pid for process in node.living())}
            # By their parents alone: psutil's own search also compares times of creation, which follow the clock.
            while more := {pid for pid, other in everybody.items() if other.info["ppid"] in below} - below:
                below |= more
            node.seen |= {pid: everybody[pid] for pid in below & everybody.keys() - node.seen.keys()}
            node.process.poll()
        return [node for node in self.all if node.raylets() and not node.leaving]

    def end(self, node: Node) -> None:
        """Kill all processes of a node at once, as a machine that is switched off."""
        node.leaving = True
        for process in node.living():
            with suppress(psutil.Error):
                process.kill()

    @contextmanager
    def ended(self) -> Iterator[None]:
        """End all nodes at the end."""
        try:
            yield
        finally:
            self.look()
            for node in self.all:
                self.end(node)
                node.process.wait(60)

    def drain(self, node: Node, seconds: int) -> "subprocess.CompletedProcess[Any]":
        """Tell the cluster that a node will be preempted."""
        return self._cluster.command(
            "drain-node", f"--address={self._cluster.address}", f"--node-id={node.id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=chaos",
            f"--deadline-remaining-seconds={seconds}",
        )  # fmt: skip


def build_wrong_clock(folder: Path) -> Path:
    """Compile the library that moves the clock of processes.

    Raises:
        SystemExit: there is no compiler.
    """
    if shutil.which("gcc") is None:
        raise SystemExit("a clock that is off needs gcc, which compiles the library that moves it: install gcc")
    library = folder / "wrong_clock.so"
    source = _HERE / "wrong_clock" / "wrong_clock.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def _command(process: psutil.Process) -> list[str]:
    """The command line of a process; an empty name for one that has ended."""
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]
