"""The node types of ``ray_cluster.yaml`` with Ray's autoscaler, as processes on this machine instead of instances."""

import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from densefeat import FeatureStore
from tests.helpers.killing import wait_for
from tests.pipeline.run.cluster import ray_clusters
from tests.pipeline.run.cluster.ray_clusters import LocalCluster, job_options

ROOT = Path(__file__).parents[4]
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
GPU, CPUS = {"CPU": 2, "GPU": 1}, {"CPU": 2}  # of a worker's node; Ray believes in the GPU
FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
NO_SPOT = "tests.pipeline.run.cluster.spot.NoSpotCapacity"
HEAD, HEAD_NODE = "ray.head.default", "f" * 51 + "00000"  # as Ray names the head's type and itself on one machine
WORKERS = """
import sys
import ray

ray.init(address="auto", log_to_driver=False)


@ray.remote(num_cpus=0, num_gpus=1)
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()


workers = [Worker.remote() for _ in range(int(sys.argv[1]))]
waiting = [worker.node.remote() for worker in workers]
while waiting:
    ready, waiting = ray.wait(waiting)
    print(*ray.get(ready), flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.slow


def here(address: str, provider: str, resources: dict[str, int]) -> dict[str, Any]:
    """The file for nodes on this machine: its types, limits and priorities, without AWS and without setup."""
    config = copy.deepcopy(CLUSTER)
    types = config["available_node_types"]
    for name in types.keys() - {"head"}:
        assert types[name]["resources"] == {}  # which Ray fills in for AWS
        types[name]["resources"] = resources
    types[HEAD] = types.pop("head")
    commands = [f"{when}{what}_commands" for when in ("", "head_", "worker_") for what in ("setup", "start_ray")]
    config |= {key: [] for key in ["initialization_commands", "cluster_synced_files", *commands]}
    del config["start_ray_commands"]
    return config | {
        "head_node_type": HEAD,
        "idle_timeout_minutes": 0.1,
        "file_mounts": {},
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "head_node_id": HEAD_NODE,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
    }


@contextmanager
def autoscaling(folder: Path, provider: str, resources: dict[str, int]) -> Iterator[tuple[LocalCluster, Path]]:
    """A cluster that starts as the head alone, and the file that its autoscaler reads again and again."""
    file = folder / "cluster.json"
    port = ray_clusters.free_port()
    address = f"{ray_clusters.own_address()}:{port}"
    file.write_text(json.dumps(here(address, provider, resources)))
    with ray_clusters.head(
        f"--autoscaling-config={file}",
        port=port,
        cwd=ROOT,
        PYTHONPATH=str(ROOT),
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        # As `ray up` starts the autoscaler.
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=HEAD_NODE,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_NODE,
    ) as cluster:
        yield cluster, file


@contextmanager
def gpu_workers(cluster: LocalCluster, count: int) -> Iterator[Iterator[str]]:
    """Actors that ask for what workers ask for; yields the nodes that they get, as they get them."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKERS, str(count)],
        env={**cluster.environment, "RAY_ADDRESS": cluster.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with ray_clusters.ended_with_children(process), process:
        yield (line.strip() for line in process.stdout)


def node_types(cluster: LocalCluster) -> dict[str, int]:
    """How many workers' nodes of each type there are."""
    said = cluster.command("status").stdout
    there = re.search(r"Active:(.*?)Pending:", said, re.DOTALL)
    assert there is not None, said
    return {name: int(count) for count, name in re.findall(r"(\d+) (gpu_\w+)", there[1])}


def test_a_worker_gets_a_spot_node_which_goes_when_it_is_idle(tmp_path: Path) -> None:
    with autoscaling(tmp_path, FAKE, GPU) as (cluster, _):
        assert node_types(cluster) == {}
        with gpu_workers(cluster, 1) as nodes:
            assert next(nodes) != HEAD_NODE
            assert node_types(cluster) == {"gpu_spot": 1}
        wait_for(lambda: node_types(cluster) == {})


def test_without_spot_capacity_nodes_on_demand_do_the_work(tmp_path: Path) -> None:
    spot_nodes = CLUSTER["available_node_types"]["gpu_spot"]["max_workers"]
    with autoscaling(tmp_path, NO_SPOT, GPU) as (cluster, file), gpu_workers(cluster, spot_nodes + 1) as nodes:
        assert next(nodes) != HEAD_NODE
        assert node_types(cluster) == {"gpu_on_demand": 1}
        time.sleep(5)  # five times as long as the autoscaler takes to ask again
        assert node_types(cluster) == {"gpu_on_demand": 1}
        # As the file says, and `ray up --no-restart` does.
        config = json.loads(file.read_text())
        config["available_node_types"]["gpu_spot"]["max_workers"] = 0
        file.write_text(json.dumps(config))
        assert all(next(nodes) != HEAD_NODE for _ in range(2))
        assert node_types(cluster).keys() == {"gpu_on_demand"}


def test_the_main_job_starts_its_nodes(tmp_path: Path, photographs: Path) -> None:
    store = tmp_path / "store"
    with autoscaling(tmp_path, FAKE, CPUS) as (cluster, _):
        command = [sys.executable, "-m", "jobs.upsample_imagenet", *job_options(photographs, store, "--workers", "1")]
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
        with (tmp_path / "log").open("w") as log:
            job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            seen: set[str] = set()
            while job.poll() is None:
                seen |= node_types(cluster).keys()
    assert job.returncode == 0, (tmp_path / "log").read_text()
    assert seen == {"gpu_spot"}
    assert len(FeatureStore(store)) == len(list(photographs.iterdir()))
