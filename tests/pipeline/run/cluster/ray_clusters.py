"""Ray clusters of several nodes on this machine, started with ``ray start`` as people and schedulers do."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.killing import wait_for

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SHARING_A_MACHINE = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def own_address() -> str:
    """The address of this machine that Ray takes."""
    import ray

    return str(ray.util.get_node_ip_address())


@contextmanager
def ended_with_children(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Kill a process and all below it at the end: not with ``ray stop``, which ends the Ray of others too."""
    try:
        yield
    finally:
        # By their parents alone: psutil's own search also compares times of creation, which follow the machine's clock.
        everybody = {other.pid: other for other in psutil.process_iter(["ppid"])}
        below = {process.pid}
        while more := {pid for pid, other in everybody.items() if other.info["ppid"] in below} - below:
            below |= more
        for pid in below & everybody.keys():
            if everybody[pid].is_running():
                everybody[pid].kill()
        process.wait(60)


@dataclass
class LocalCluster:
    """A head, to which nodes can be added.

    Attributes:
        environment: of all commands that talk to the cluster.
        address: of the head.
    """

    environment: dict[str, str]
    address: str

    def command(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command of Ray."""
        return subprocess.run(
            [*RAY, *arguments], env=self.environment, capture_output=True, text=True, check=False, **options
        )

    def count_nodes(self) -> int:
        """How many nodes live, with the head."""
        return self.command("status").stdout.count("\n 1 node_")

    @contextmanager
    def node(self, cpus: int) -> Iterator[None]:
        """A further node while the context lasts."""
        before = self.count_nodes()
        process = subprocess.Popen(
            [*RAY, "start", f"--address={self.address}", "--block", f"--num-cpus={cpus}", *SHARING_A_MACHINE],
            env=self.environment,
            stdout=subprocess.DEVNULL,
        )
        with ended_with_children(process):
            wait_for(lambda: self.count_nodes() > before)  # two that start at once on a machine wait for each other
            yield


@contextmanager
def head(*arguments: str, cwd: Path, port: int = 0, **environment: str) -> Iterator[LocalCluster]:
    """A cluster whose head has no CPUs to give out, with a token that all need who talk to it.

    Args:
        arguments: further ones for ``ray start``.
        cwd: working directory of its processes.
        port: that it listens on; 0: any.
        environment: further variables for its processes.
    """
    port, dashboard = port or free_port(), free_port()
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: Ray puts sockets there
        cluster = LocalCluster(
            {
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "RAY_TMPDIR": folder,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
                **environment,
            },
            f"{own_address()}:{port}",
        )
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", *SHARING_A_MACHINE]
        process = subprocess.Popen(
            [*RAY, "start", "--head", "--block", "--num-cpus=0", *ports, *arguments],
            cwd=cwd,
            env=cluster.environment,
            stdout=subprocess.DEVNULL,
        )
        with ended_with_children(process):
            wait_for(lambda: process.poll() is not None or cluster.command("status").returncode == 0)
            assert process.poll() is None, "the head has ended"
            yield cluster


def link_many(photographs: Path, folder: Path) -> None:
    """Make a folder with thirty links to each photograph: for a job that takes long enough to be stopped."""
    folder.mkdir()
    for photograph in photographs.iterdir():
        for copy in range(30):
            os.link(photograph, folder / f"{copy:02}_{photograph.name}")


def job_options(images: Path | str, store: Path | str, *more: str) -> Sequence[str]:
    """Options of a main job that a CPU does in seconds."""
    options = {
        "images": images, "store": store, "backbone": "resnet18", "weights": "random", "layer": 2, "size": 64,
        "components": 8, "shard-images": 4, "batch-size": 2, "device": "cpu",
    }  # fmt: skip
    return [*(text for name, value in options.items() for text in (f"--{name}", str(value))), *more]
