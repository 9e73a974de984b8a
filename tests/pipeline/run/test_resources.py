"""What a process may use of its machine, and where workers go on a cluster."""

from pathlib import Path

import pytest
import torch

from pipeline.run import resources
from pipeline.run.resources import (
    GPU_SHARDS,
    Node,
    Slot,
    available_cores,
    available_memory,
    cpus_of_each,
    fits_this_process,
    places_for_workers,
    places_on_joined,
    shards_at_once,
    shards_computing,
    threads_in_training,
    torch_threads,
    worker_threads,
)

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
GB = 10**9


def machine(
    root: Path, groups: str, mounts: str, files: dict[str, str], *, available_kb: int | None = 64_000_000
) -> Path:
    """A root folder with the files of a kernel."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    if available_kb is not None:
        files["proc/meminfo"] = f"MemTotal: 99000000 kB\nMemFree: 1000 kB\nMemAvailable: {available_kb} kB\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda process: range(64), raising=False)


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        pytest.param("0::/", V2, {"sys/fs/cgroup/cpu.max": "max 100000"}, 64, id="no quota"),
        pytest.param("0::/", V2, {}, 64, id="no controller"),
        pytest.param("0::/", V2, {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4, id="a container of version 2"),
        pytest.param("0::/", V2, {"sys/fs/cgroup/cpu.max": "150000 100000"}, 2, id="one and a half"),
        pytest.param("0::/", V2, {"sys/fs/cgroup/cpu.max": "20000 100000"}, 1, id="a fifth"),
        pytest.param("0::/", V2, {"sys/fs/cgroup/cpu.max": "9900000 100000"}, 64, id="more than there are"),
        pytest.param(
            "0::/a/b",
            V2,
            {
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "800000 100000",
                "sys/fs/cgroup/cpu.max": "max 100000",
            },
            8,
            id="the group above has one",
        ),
        pytest.param(
            "5:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n0::/",
            "41 31 0:29 /docker/x /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3,
            id="a container of version 1",
        ),
        pytest.param(
            "5:cpu:/jobs/7",
            "41 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
            {
                "sys/fs/cgroup/cpu/jobs/7/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/jobs/7/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/jobs/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu/jobs/cpu.cfs_period_us": "50000",
            },
            10,
            id="version 1, the group above",
        ),
        pytest.param(
            "5:cpuset:/x",
            "41 31 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
            {"sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpuset/x/cpu.cfs_period_us": "100000"},
            64,
            id="another controller",
        ),
        pytest.param(
            "0::/../../elsewhere",
            V2,
            {"sys/fs/cgroup/cpu.max": "200000 100000"},
            2,
            id="a group outside of what is mounted",
        ),
    ],
)
def test_cores(tmp_path: Path, groups: str, mounts: str, files: dict[str, str], expected: int) -> None:
    assert available_cores(machine(tmp_path, groups, mounts, files)) == expected


@pytest.mark.usefixtures("cores")
def test_cores_without_linux(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 64


def test_here() -> None:
    assert 1 <= available_cores() <= torch.multiprocessing.cpu_count()
    assert available_memory() > 100_000_000


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        pytest.param("0::/", V2, {}, 65_536 * 10**6, id="what the machine has free"),
        pytest.param("0::/", V2, {"sys/fs/cgroup/memory.max": "max"}, 65_536 * 10**6, id="no limit"),
        pytest.param(
            "0::/",
            V2,
            {
                "sys/fs/cgroup/memory.max": str(8 * GB),
                "sys/fs/cgroup/memory.current": str(7 * GB),
                "sys/fs/cgroup/memory.stat": f"anon {GB}\nfile {6 * GB}\ninactive_file {5 * GB}\n",
            },
            6 * GB,
            id="caches are given up",
        ),
        pytest.param(
            "3:memory:/pod",
            "41 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
            {
                "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": str(4 * GB),
                "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": str(3 * GB),
                "sys/fs/cgroup/memory/pod/memory.stat": "total_inactive_file 0\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "0",
            },
            1 * GB,
            id="version 1",
        ),
    ],
)
def test_memory(tmp_path: Path, groups: str, mounts: str, files: dict[str, str], expected: int) -> None:
    assert available_memory(machine(tmp_path, groups, mounts, files, available_kb=64_000_000)) == expected


@pytest.mark.parametrize(
    ("device", "cores", "gpus", "granted", "expected"),
    [
        ("cuda", 8, 1, 0, 8),  # one GPU's worker decodes on all cores
        ("cuda", 96, 8, 0, 12),
        ("cuda", 4, 8, 0, 1),
        ("cuda", 8, 0, 0, 8),  # Ray was not told of the GPU
        ("cpu", 64, 0, 64, 64),
        ("cpu", 8, 0, 40, 8),  # Ray was told of more than there are
        ("cpu", 64, 0, 8, 8),
        ("cpu", 2, 0, 0, 1),
    ],
)
def test_threads_of_a_worker(device: str, cores: int, gpus: int, granted: float, expected: int) -> None:
    assert worker_threads(device, cores, gpus=gpus, granted=granted) == expected


@pytest.mark.parametrize(
    ("cores", "workers", "granted", "expected"),
    [(8, 1, None, 8), (96, 8, None, 12), (2, 4, None, 1), (8, 2, 4, 4), (8, 2, 1, 1), (8, 1, 40, 8)],
)
def test_threads_of_a_training_process(cores: int, workers: int, granted: int | None, expected: int) -> None:
    assert threads_in_training(cores, workers, granted) == expected


HEAD = Node("head", 0, 0)


def test_each_cpu_node_is_filled_and_a_head_that_only_drives_is_none() -> None:
    nodes = [HEAD, Node("small", 8, 0), Node("large", 64, 0)]
    assert places_for_workers("cpu", nodes, None) == [Slot(8, 0, "small"), Slot(64, 0, "large")]
    assert places_for_workers("cpu", [HEAD], None) == []


def test_a_gpu_worker_fits_wherever_there_is_a_gpu() -> None:
    nodes = [HEAD, Node("a", 8, 1), Node("b", 0, 2)]
    assert places_for_workers("cuda", nodes, None) == [Slot(0, 1)] * 3
    assert places_for_workers("cuda", [HEAD], (1, 8)) == [Slot(0, 1)] * 8  # nodes come when they are asked for


def test_small_backbones_share_gpus_and_their_workers_the_cores() -> None:
    nodes = [HEAD, Node("a", 8, 1), Node("b", 0, 2)]
    assert places_for_workers("cuda", nodes, None, 0.5) == [Slot(0, 0.5)] * 6
    assert places_for_workers("cuda", nodes, None, 0.3) == [Slot(0, 0.3)] * 9
    assert places_for_workers("cuda", nodes, (1, 4), 0.5) == [Slot(0, 0.5)] * 4
    assert worker_threads("cuda", 16, gpus=2, granted=0, gpu_share=0.5) == 4
    assert worker_threads("cuda", 16, gpus=2, granted=0, gpu_share=1 / 3) == 2


def test_nodes_that_join_get_workers() -> None:
    slots = places_for_workers("cpu", [HEAD, Node("a", 8, 0)], None)
    assert places_on_joined("cpu", [HEAD, Node("a", 8, 0)], slots) == []
    assert places_on_joined("cpu", [Node("b", 4, 0), Node("a", 8, 0)], slots) == [Slot(4, 0, "b")]
    lost = [slot.anywhere([]) for slot in slots]  # its node is gone: a node that replaces it is for it
    assert places_on_joined("cpu", [Node("b", 4, 0)], lost) == []
    assert places_on_joined("cuda", [Node("a", 8, 2), Node("b", 8, 1)], [Slot(0, 1)] * 2) == [Slot(0, 1)]


@pytest.mark.parametrize(
    ("cpus", "count", "each"),
    [
        ([], 8, 1),
        ([8], 1, 8),
        ([8], 2, 4),
        ([8], 3, 2),
        ([8, 8], 2, 8),
        ([8, 8], 8, 2),
        ([64, 8, 8], 9, 8),
        ([64, 8, 8], 11, 7),
        ([64], 64, 1),
        ([2], 5, 1),
        ([3, 3], 4, 1),
    ],
)
def test_what_each_of_a_number_of_workers_asks_for(cpus: list[int], count: int, each: int) -> None:
    assert cpus_of_each(cpus, count) == each
    nodes = [HEAD, *(Node(str(i), have, 0) for i, have in enumerate(cpus))]
    assert places_for_workers("cpu", nodes, (count, count)) == [Slot(each, 0)] * count
    if each > 1:
        assert sum(have // each for have in cpus) >= count  # all fit


def test_a_worker_whose_node_is_gone_fits_any_other() -> None:
    nodes = [HEAD, Node("small", 8, 0)]
    assert Slot(64, 0, "large").anywhere(nodes) == Slot(8, 0)
    assert Slot(4, 0).anywhere(nodes) == Slot(4, 0)
    assert Slot(64, 0, "large").anywhere([HEAD]) == Slot(64, 0)
    assert Slot(0, 1).anywhere(nodes) == Slot(0, 1)


@pytest.mark.parametrize(
    ("device", "threads", "memory", "task", "expected"),
    [
        ("cuda", 64, GB, GB, 1),
        ("cpu", 64, 256 * GB, 600 * 10**6, 64),  # all cores compute
        ("cpu", 64, 16 * GB, 600 * 10**6, 17),  # 18 shards are in it
        ("cpu", 2, GB, 600 * 10**6, 1),
        ("cpu", 64, 0, 600 * 10**6, 1),
    ],
)
def test_as_many_shards_compute_as_cores_and_memory_allow(
    device: str, threads: int, memory: int, task: int, expected: int
) -> None:
    assert shards_computing(device, threads, memory=memory, task_nbytes=task) == expected


@pytest.mark.parametrize(
    ("device", "computing", "memory", "waiting", "expected"),
    [
        ("cuda", 1, 128 * GB, 330 * 10**6, GPU_SHARDS),
        ("cuda", 1, 4 * GB, 330 * 10**6, 8),
        ("cuda", 1, 0, 330 * 10**6, 2),  # one computes, and one reads or writes
        ("cpu", 64, 256 * GB, 330 * 10**6, 65),
        ("cpu", 1, 256 * GB, 330 * 10**6, 2),
    ],
)
def test_on_a_gpu_more_shards_wait_than_compute(
    device: str, computing: int, memory: int, waiting: int, expected: int
) -> None:
    assert shards_at_once(device, computing, memory=memory, waiting_nbytes=waiting) == expected


def test_torch_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("workers", "images", "address", "gpus", "expected"),
    [
        (None, 60, None, 0, True),
        (None, 60, None, 1, True),
        (None, 60, None, 2, False),  # a worker each
        (None, 1001, None, 0, False),  # hours: a worker that crashes is worth replacing
        (None, 60, "auto", 0, False),  # a cluster was named
        ((0, 0), 10**6, "auto", 8, True),
        ((1, 1), 1, None, 0, False),
    ],
)
def test_small_jobs_run_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
    workers: tuple[int, int] | None,
    images: int,
    address: str | None,
    gpus: int,
    expected: bool,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert fits_this_process(workers, "auto", images) == expected
    if gpus > 1 and workers is None:
        assert fits_this_process(workers, "cpu", images)  # GPUs that are not asked for count for nothing
