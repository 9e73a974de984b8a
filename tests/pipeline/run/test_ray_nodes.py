"""Nodes that come and go: several of Ray's on this machine, killed for real."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.resources import Slot, places_for_workers
from tests.helpers.scripted_workers import SPEC, ScriptedWorker, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """With a head that has no CPUs to give out."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)  # for tests.helpers
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        ray.init(address=cluster.address, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_a_node_that_is_lost_costs_no_attempt(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.run.ray.cluster import living_nodes
    from pipeline.run.ray.workers import RayWorkers

    spot = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    slots = places_for_workers("cpu", living_nodes(), None)
    assert slots == [Slot(2, 0, spot.node_id)]
    lost = False

    def on_progress(images: int) -> None:
        nonlocal lost
        if images and not lost:
            lost = True
            cluster.add_node(num_cpus=1)  # smaller
            cluster.remove_node(spot, allow_graceful=False)

    with RayWorkers(SPEC.on("cpu", 1), slots, attempts=1, make=make, first_wait_s=0.05) as workers:
        tasks = [(5.0, number) for number in range(4)]
        assert dict(workers.map(ScriptedWorker.slow, tasks, on_progress)) == {number: number for number in range(4)}
    assert lost
    assert f"its node {spot.node_id} is gone" in caplog.text


def test_nodes_that_join_get_work_and_idle_workers_go(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.run.ray.workers import RayWorkers

    caplog.set_level(logging.INFO)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    nodes: set[str | None] = set()
    joined = False
    slots = [Slot(1, 0)] * 4  # one more than ever fits

    with RayWorkers(SPEC.on("cpu", 1), slots, least=1, idle_s=2, make=make, first_wait_s=0.05) as workers:

        def on_progress(images: int) -> None:
            nonlocal joined
            nodes.update(actor.node for actor in workers._crew if actor.room)
            if images and not joined:
                joined = True
                cluster.add_node(num_cpus=2)

        tasks = [(2.0, number) for number in range(24)]
        assert dict(workers.map(ScriptedWorker.slow, tasks, on_progress)) == {number: number for number in range(24)}
        assert len(nodes) == 2
        # The last task is long: workers without one are released meanwhile, but for the one that has it.
        assert dict(workers.map(ScriptedWorker.slow, [(8.0, 0)])) == {0: 0}
        assert len(workers._crew) == 1
    assert "releasing worker" in caplog.text


def test_a_node_with_a_wrong_clock_gets_no_work_and_costs_no_attempt(
    cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.run.ray.workers import RayWorkers

    late, good = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    slots = [Slot(1, 0, late.node_id), Slot(1, 0, good.node_id), Slot(1, 0)]  # the last waits for a place
    with RayWorkers(SPEC.on("cpu", 1), slots, attempts=1, make=make, first_wait_s=0.05) as workers:
        tasks = [(late.node_id, number) for number in range(60)]
        assert dict(workers.map(ScriptedWorker.refused_on, tasks)) == {number: number for number in range(60)}
    assert caplog.text.count(f"node {late.node_id} gets no work for a while: s3://x: the clock of here") == 1


def test_no_worker_is_placed_on_a_node_that_is_left_out(cluster: Any) -> None:
    import ray

    from pipeline.run.ray.remote_worker import RemoteWorker

    bad, good = cluster.add_node(num_cpus=4), cluster.add_node(num_cpus=4)
    cluster.wait_for_nodes()
    workers = [RemoteWorker(i, Slot(1, 0, bad.node_id), i, [bad.node_id]) for i in range(3)]
    assert [ray.get(worker.start, timeout=60) for worker in workers] == [good.node_id] * 3
    for worker in workers:
        worker.kill()
