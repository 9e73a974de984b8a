"""What a process may use of its machine, and where a job's workers go on a cluster. Knows nothing of Ray.

A machine's number of cores says little in a container: affinity and cgroup limits count. And a cluster's sums say
nothing of its nodes: every process looks at its own.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

__all__ = [
    "Node",
    "Slot",
    "all_cores",
    "available_cores",
    "available_memory",
    "cpus_of_each",
    "fits_this_process",
    "places_for_workers",
    "shards_computing",
    "threads_in_operations",
    "threads_in_training",
    "torch_threads",
    "worker_threads",
]

_ROOT = Path("/")
_FEW_IMAGES = 1000
_MEMORY_SHARE = 0.7  # of what is free, for shards: the rest is for stages, libraries, and what is estimated too low


def available_cores(root: Path = _ROOT) -> int:
    """Cores that this process may use: those of its affinity, and no more than its cgroups' quota, at least 1.

    Args:
        root: folder that has ``proc`` and ``sys``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may still take: what the machine has free, and what is left of its cgroups' limits.

    Args:
        root: as `available_cores`.
    """
    left = [_free_memory(root)]
    left += [free for folder in _cgroup_folders("memory", root) if (free := _memory_left(folder)) is not None]
    return max(0, min(left))


def worker_threads(device: str, cores: int, *, gpus: int, granted: float) -> int:
    """Threads of one of the workers on a node.

    Args:
        device: "cpu" or "cuda".
        cores: that processes on the node may use.
        gpus: of the node: each may have a worker, and they share the cores.
        granted: CPUs that a worker on the CPU was given.
    """
    return max(1, cores // max(gpus, 1) if device == "cuda" else min(cores, int(granted)))


def threads_in_training(cores: int, workers_on_node: int, granted: int | None) -> int:
    """Threads of one of the processes that train on a node.

    Args:
        cores: that processes on the node may use.
        workers_on_node: that share them.
        granted: CPUs that each was given; None: it trains on a GPU.
    """
    return max(1, min(cores // max(workers_on_node, 1), cores if granted is None else granted))


def shards_computing(device: str, threads: int, *, memory: float, task_nbytes: int) -> int:
    """How many shards compute at the same time in a worker: one on a GPU, one a thread on a CPU if memory allows.

    Args:
        device: "cpu" or "cuda".
        threads: of the worker.
        memory: bytes that the worker may take.
        task_nbytes: about what a shard in the worker takes; there is one more of them than compute.
    """
    if device != "cpu":
        return 1
    return max(1, min(threads, int(_MEMORY_SHARE * memory / task_nbytes) - 1))


def threads_in_operations(device: str, threads: int) -> int:
    """Threads for torch inside of an operation, in a worker's process.

    On a CPU it is parallel over shards, not inside of operations: threads that wait for each other at every operation
    lose most of their time where decoding and compression want the same cores.
    """
    return 1 if device == "cpu" else threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's threads inside of operations, for all of this process: to be set by whoever owns the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_cores() -> AbstractContextManager[None]:
    """Torch's threads in a process that has the machine to itself; torch knows of no cgroup's quota."""
    return torch_threads(min(torch.get_num_threads(), available_cores()))


def fits_this_process(workers: int | None, device: str, images: int) -> bool:
    """Whether a job needs no Ray: one worker on this machine would do all of it, and soon.

    A worker in this process is as fast as one of Ray's and starts 20 s sooner; Ray replaces one that crashes or hangs.

    Args:
        workers: as asked for; 0: no Ray, None: to be decided here.
        device: "auto", "cpu" or "cuda".
        images: of the job.
    """
    if workers is not None:
        return workers == 0
    several_gpus = device != "cpu" and torch.cuda.device_count() > 1
    return images <= _FEW_IMAGES and not several_gpus and not os.environ.get("RAY_ADDRESS")


@dataclass(frozen=True)
class Node:
    """A machine of a cluster.

    Attributes:
        name: the cluster's identifier of it.
        cpus: that the cluster gives out on it; a head node may have 0.
        gpus: the same.
    """

    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Slot:
    """What a worker asks of the cluster.

    Attributes:
        cpus: CPUs.
        gpus: GPUs, 0 or 1.
        node: the node that it is meant for; None: any that has room.
    """

    cpus: int
    gpus: int
    node: str | None = None

    def anywhere(self, nodes: Sequence[Node]) -> "Slot":
        """For a worker whose node is gone: it must fit any node that has CPUs, also one that is yet to come."""
        return Slot(min([self.cpus, *(node.cpus for node in nodes if node.cpus)]), self.gpus)


def places_for_workers(device: str, nodes: Sequence[Node], count: int | None) -> list[Slot]:
    """What each worker asks for; empty where there is no place for any.

    Args:
        device: "cpu" or "cuda".
        nodes: of the cluster, those that are alive.
        count: of workers; None: one a GPU, or one a node that has CPUs, with all of that node's CPUs.
    """
    if device == "cuda":
        # No CPU: it fits wherever there is a GPU, and a worker counts its threads by itself.
        return [Slot(0, 1)] * (sum(node.gpus for node in nodes) if count is None else count)
    nodes = [node for node in nodes if node.cpus]
    if count is None:
        return [Slot(node.cpus, 0, node.name) for node in nodes]
    return [Slot(cpus_of_each([node.cpus for node in nodes], count), 0)] * count


def cpus_of_each(cpus: Sequence[int], count: int) -> int:
    """The most CPUs that each of ``count`` workers can ask for so that all fit on nodes of so many CPUs, at least 1.

    Where all do not fit, or there is no node yet, 1: they fit on whatever nodes are added.
    """
    for each in range(max(cpus, default=1), 1, -1):
        if sum(have // each for have in cpus) >= count:
            return each
    return 1


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Of the process's cgroup and those above it that can be seen from here, version 1 and 2."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    paths: dict[str, str] = {}  # controller, "" for version 2 -> path of the process's group
    for line in groups:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    folders: list[Path] = []
    for mount_root, mount, kind, options in map(_mount, mounts):
        if kind == "cgroup2" and "" in paths:
            path = paths[""]
        elif kind == "cgroup" and controller in options and controller in paths:
            path = paths[controller]
        else:
            continue
        group = PurePosixPath(path)
        # In a container the mount's root is the container's own group, or the path is one that is not seen here.
        inside = group.relative_to(mount_root) if group.is_relative_to(mount_root) else PurePosixPath()
        folder = root / mount.lstrip("/")
        folders += [folder / part for part in [inside, *inside.parents] if ".." not in part.parts]
    return folders


def _mount(line: str) -> tuple[str, str, str, list[str]]:
    """Of a line of mountinfo: root, where it is mounted, type, options of the file system."""
    own, _, file_system = line.partition(" - ")
    fields, (kind, _, options) = own.split(" "), file_system.split(" ", 2)
    return fields[3], fields[4].replace("\\040", " "), kind, options.split(",")


def _cpu_quota(folder: Path) -> float | None:
    """Cores that a cgroup may use; None: all."""
    quota, period = [*_words(folder / "cpu.max"), "", ""][:2]
    if not quota:
        quota = " ".join(_words(folder / "cpu.cfs_quota_us"))
        period = " ".join(_words(folder / "cpu.cfs_period_us"))
    if quota.isdigit() and period.isdigit() and int(period):  # "max", and -1, are none
        return int(quota) / int(period)
    return None


def _memory_left(folder: Path) -> int | None:
    """Bytes up to a cgroup's limit, of which file caches do not count; None: no limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        words = [*_words(folder / limit), *_words(folder / used)]
        if len(words) == 2 and all(word.isdigit() for word in words):
            statistics = _words(folder / "memory.stat")
            cached = int(statistics[statistics.index(cache) + 1]) if cache in statistics else 0
            return int(words[0]) - int(words[1]) + cached
    return None


def _free_memory(root: Path) -> int:
    words = _words(root / "proc/meminfo")
    if "MemAvailable:" in words:
        return 1024 * int(words[words.index("MemAvailable:") + 1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
