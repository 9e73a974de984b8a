"""The simulation of a cluster, where the right answer is known."""

from dataclasses import replace

import pytest

from benchmarks.jobs.cluster_model import Cluster, Cost, Storage, floor, simulate

# One of these dominates in each test.
COST = Cost(decode_s=0.0, device_s=0.0, encode_s=0.0, rest_s=0.0, read_bytes=0.0, written_bytes=0.0, shard_rows=64)
LIMITS = {
    "cores": (replace(COST, decode_s=0.02, encode_s=0.03), Storage(), Cluster(4, 8, shards_at_once=4)),
    "GPU": (replace(COST, device_s=0.01), Storage(), Cluster(4, 8, shards_at_once=2)),
    "network in": (replace(COST, read_bytes=1e5), Storage(), Cluster(4, 8, shards_at_once=2, bytes_per_s=1e6)),
    "network out": (replace(COST, written_bytes=1e6), Storage(), Cluster(4, 8, shards_at_once=2, bytes_per_s=1e7)),
    "GET rate": (COST, Storage(gets_per_s=100), Cluster(4, 8, shards_at_once=2)),
    "PUT rate": (COST, Storage(puts_per_s=10), Cluster(4, 8, shards_at_once=2)),
    "driver": (COST, Storage(), Cluster(4, 8, shards_at_once=2, driver_s=0.1)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_busiest_server_sets_the_rate(name: str) -> None:
    cost, storage, cluster = LIMITS[name]
    outcome = simulate(64 * 400, cost, storage, cluster)
    limit, by = floor(cost, storage, cluster)
    assert by == outcome.bottleneck == name
    assert outcome.images / outcome.seconds <= limit * (1 + 1e-9)
    assert outcome.steady_images_per_s == pytest.approx(limit, rel=0.03)


def test_a_shard_alone_takes_the_sum_of_its_steps() -> None:
    cost = Cost(0.016, 0.002, 0.032, 0.001, 1e5, 1e6, 64)
    storage, cluster = Storage(latency_s=0.1), Cluster(1, 16, shards_at_once=1, bytes_per_s=1e8, driver_s=0.5)
    requests = 1 + 2 + 1 + 1 + 2  # of the record, before writing, of the intent, the object, and the commit
    reading = 64 / 8 / 2 * 0.1 + 2 * 8 * 1e5 / 1e8  # two requests at a time share the network
    last_images = 8 * 0.016 / 16 * 2  # whose decoding is not hidden by reading
    rest = 2 * 32 * 0.002 + 32 * 0.032 / 16 + 64 * 0.001 + 64 * 1e6 / 1e8 + 0.5
    outcome = simulate(64, cost, storage, cluster)
    assert outcome.seconds == pytest.approx(requests * 0.1 + reading + last_images + rest, rel=0.05)


def test_one_request_has_one_connection() -> None:
    cost = replace(COST, written_bytes=1e6)
    storage, cluster = Storage(request_bytes_per_s=1e7), Cluster(1, 1, shards_at_once=1, bytes_per_s=1e9)
    assert simulate(640, cost, storage, cluster).seconds == pytest.approx(64)


def test_with_latency_alone_shards_at_once_are_the_rate() -> None:
    storage = Storage(latency_s=0.1)
    rates = [
        simulate(6400, COST, storage, Cluster(1, 8, shards_at_once=shards)).steady_images_per_s for shards in (1, 2, 4)
    ]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)
    assert rates[2] == pytest.approx(4 * rates[0], rel=0.05)
    assert simulate(6400, COST, storage, Cluster(1, 8)).bottleneck == "latency"


def test_preempted_shards_are_made_again() -> None:
    cost = replace(COST, device_s=0.01)
    calm = Cluster(16, 8, per_node=8)
    stormy = replace(calm, preemptions_per_hour=600, replaced_s=3)
    without, outcome = (simulate(64 * 1600, cost, Storage(), cluster) for cluster in (calm, stormy))
    assert without.lost_shards == 0 < outcome.lost_shards
    assert outcome.seconds > without.seconds
    assert simulate(64 * 1600, cost, Storage(), stormy) == outcome  # the seed decides
    assert simulate(64 * 1600, cost, Storage(), stormy, seed=1) != outcome


def test_the_last_shard_may_be_smaller() -> None:
    cost = replace(COST, device_s=0.01)
    assert simulate(100, cost, Storage(), Cluster(1, 1)).seconds == pytest.approx(1.0)
    assert simulate(1, cost, Storage(), Cluster(1, 1)).seconds == pytest.approx(0.01)
