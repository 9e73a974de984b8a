"""Resources that a process may use on its machine, and the placement of a job's workers on a cluster.

Independent of Ray. In a container, the machine's number of cores says little: affinity and cgroup limits decide. The
totals of a cluster say nothing about its nodes, so every process examines its own node.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

__all__ = [
    "GPU_SHARDS",
    "Node",
    "Slot",
    "all_cores",
    "available_cores",
    "available_memory",
    "cpus_of_each",
    "fits_this_process",
    "places_for_workers",
    "places_on_joined",
    "shards_at_once",
    "shards_computing",
    "threads_in_operations",
    "threads_in_training",
    "torch_threads",
    "worker_threads",
    "workers_on_gpu",
]

_ROOT = Path("/")
_FEW_IMAGES = 1000
GPU_SHARDS = 16  # that a worker on a GPU has at once: with requests of 150 ms, most of them wait for the storage
_MEMORY_SHARE = 0.7  # of free memory, for shards; the rest is for stages, libraries and estimates that are too low


def available_cores(root: Path = _ROOT) -> int:
    """Cores that this process may use: the size of its affinity mask, limited by its cgroups' quotas; at least 1.

    Args:
        root: folder that contains ``proc`` and ``sys``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may still allocate: the machine's free memory, limited by what its cgroups have left.

    Args:
        root: as in `available_cores`.
    """
    left = [_free_memory(root)]
    left += [free for folder in _cgroup_folders("memory", root) if (free := _memory_left(folder)) is not None]
    return max(0, min(left))


def worker_threads(device: str, cores: int, *, gpus: int, granted: float, gpu_share: float = 1.0) -> int:
    """Threads of a worker on a node.

    Args:
        device: "cpu" or "cuda".
        cores: cores that processes on the node may use.
        gpus: GPUs of the node; each may have workers, and these share the cores.
        granted: CPUs that the cluster assigned to a worker on the CPU.
        gpu_share: share of a GPU that the worker takes.
    """
    if device != "cuda":
        return max(1, min(cores, int(granted)))
    return max(1, cores // (max(gpus, 1) * workers_on_gpu(gpu_share)))


def workers_on_gpu(gpu_share: float) -> int:
    """Number of workers that fit on a GPU, if each takes a share of it, at most 1."""
    return max(1, int(1 / gpu_share + 1e-9))


def threads_in_training(cores: int, workers_on_node: int, granted: int | None) -> int:
    """Threads of a training process on a node.

    Args:
        cores: cores that processes on the node may use.
        workers_on_node: number of training processes that share the cores.
        granted: CPUs that the cluster assigned to each process; None: it trains on a GPU.
    """
    return max(1, min(cores // max(workers_on_node, 1), cores if granted is None else granted))


def shards_computing(device: str, threads: int, *, memory: float, task_nbytes: int) -> int:
    """Number of shards that compute at the same time in a worker: 1 on a GPU, 1 per thread on a CPU if memory allows.

    Args:
        device: "cpu" or "cuda".
        threads: threads of the worker.
        memory: bytes that the worker may allocate.
        task_nbytes: approximate memory of a shard; the worker has one more shard in memory than are computing.
    """
    if device != "cpu":
        return 1
    return max(1, min(threads, int(_MEMORY_SHARE * memory / task_nbytes) - 1))


def shards_at_once(device: str, computing: int, *, memory: float, waiting_nbytes: int) -> int:
    """Number of shards that a worker has at the same time, with those that read, encode and write.

    Args:
        device: "cpu" or "cuda".
        computing: number of shards that compute at the same time.
        memory: bytes that the worker may allocate.
        waiting_nbytes: approximate memory of a shard that does not compute, outside the device.
    """
    if device == "cpu":
        return computing + 1
    return max(computing + 1, min(GPU_SHARDS, int(_MEMORY_SHARE * memory / waiting_nbytes)))


def threads_in_operations(device: str, threads: int) -> int:
    """Threads of torch within an operation, in a worker process.

    On a CPU, a worker is parallel over shards and not within operations: threads that synchronize at every operation
    lose most of their time when decoding and compression compete for the same cores.
    """
    return 1 if device == "cpu" else threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's threads within operations, for the whole process; only for code that owns the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_cores() -> AbstractContextManager[None]:
    """Set torch's threads for a process that does not share the machine; torch itself ignores cgroup quotas."""
    return torch_threads(min(torch.get_num_threads(), available_cores()))


def fits_this_process(workers: tuple[int, int] | None, device: str, images: int) -> bool:
    """Whether a job needs no Ray: one worker on this machine would do all of it, and soon.

    A worker in this process is as fast as one of Ray's and starts 20 s sooner; Ray replaces one that crashes or hangs.

    Args:
        workers: smallest and largest number asked for; 0: no Ray, None: to be decided here.
        device: "auto", "cpu" or "cuda".
        images: of the job.
    """
    if workers is not None:
        return workers == (0, 0)
    several_gpus = device != "cpu" and torch.cuda.device_count() > 1
    return images <= _FEW_IMAGES and not several_gpus and not os.environ.get("RAY_ADDRESS")


@dataclass(frozen=True)
class Node:
    """A machine of a cluster.

    Attributes:
        name: the cluster's identifier of the node.
        cpus: CPUs that the cluster can assign on the node; a head node may have 0.
        gpus: GPUs that the cluster can assign on the node.
    """

    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Slot:
    """Resources that a worker requests from the cluster.

    Attributes:
        cpus: number of CPUs.
        gpus: share of a GPU, 0 … 1.
        node: preferred node; None: any node with free resources.
    """

    cpus: int
    gpus: float
    node: str | None = None

    def anywhere(self, nodes: Sequence[Node]) -> "Slot":
        """The slot for a worker whose node is gone: it must fit on any node that has CPUs, even one added later."""
        return Slot(min([self.cpus, *(node.cpus for node in nodes if node.cpus)]), self.gpus)


def places_for_workers(
    device: str, nodes: Sequence[Node], count: tuple[int, int] | None, gpu_share: float = 1.0
) -> list[Slot]:
    """Resources to request for each worker; empty if no worker can be placed.

    Args:
        device: "cpu" or "cuda".
        nodes: nodes of the cluster that are alive.
        count: smallest and largest number of workers; None: as many as fit on the GPUs, or one per node that has CPUs,
            with all CPUs of the node.
        gpu_share: share of a GPU that each takes.
    """
    if device == "cuda":
        # No CPU, so that the worker fits wherever there is a GPU; it determines its number of threads itself.
        fitting = sum(node.gpus for node in nodes) * workers_on_gpu(gpu_share)
        return [Slot(0, gpu_share)] * (fitting if count is None else count[1])
    nodes = [node for node in nodes if node.cpus]
    if count is None:
        return [Slot(node.cpus, 0, node.name) for node in nodes]
    return [Slot(cpus_of_each([node.cpus for node in nodes], count[0] or 1), 0)] * count[1]


def places_on_joined(device: str, nodes: Sequence[Node], slots: Sequence[Slot], gpu_share: float = 1.0) -> list[Slot]:
    """Further slots for workers on nodes that joined the cluster, beyond the ``slots`` there are.

    Arguments as for `places_for_workers`.
    """
    places = places_for_workers(device, nodes, None, gpu_share)
    taken = {slot.node for slot in slots}
    places.sort(key=lambda slot: slot.node in taken)
    return places[: max(0, len(places) - len(slots))]


def cpus_of_each(cpus: Sequence[int], count: int) -> int:
    """Largest number of CPUs that each of ``count`` workers can request so that all fit on nodes with ``cpus`` CPUs.

    It is 1 if they do not all fit, or if there is no node yet: workers then fit on any nodes that are added.
    """
    for each in range(max(cpus, default=1), 1, -1):
        if sum(on_node // each for on_node in cpus) >= count:
            return each
    return 1


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Folders of the process's cgroup and of its visible ancestors, for cgroup versions 1 and 2."""
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
        # In a container, the mount's root is the container's own group, or the path is not visible from here.
        inside = group.relative_to(mount_root) if group.is_relative_to(mount_root) else PurePosixPath()
        folder = root / mount.lstrip("/")
        folders += [folder / part for part in [inside, *inside.parents] if ".." not in part.parts]
    return folders


def _mount(line: str) -> tuple[str, str, str, list[str]]:
    """Parse a line of mountinfo: root, mount point, file system type, file system options."""
    own, _, file_system = line.partition(" - ")
    fields, (kind, _, options) = own.split(" "), file_system.split(" ", 2)
    return fields[3], fields[4].replace("\\040", " "), kind, options.split(",")


def _cpu_quota(folder: Path) -> float | None:
    """Cores that a cgroup may use; None: no limit."""
    quota, period = [*_words(folder / "cpu.max"), "", ""][:2]
    if not quota:
        quota = " ".join(_words(folder / "cpu.cfs_quota_us"))
        period = " ".join(_words(folder / "cpu.cfs_period_us"))
    if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean no limit
        return int(quota) / int(period)
    return None


def _memory_left(folder: Path) -> int | None:
    """Bytes left below a cgroup's limit, not counting file caches as used; None: no limit."""
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
