"""Decoding on other nodes: the same batches as here, whatever happens there. Nodes are real ones of Ray's, here."""

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import tyro

from densefeat.errors import StorageUnavailable, WrongClock
from pipeline.errors import JobError
from pipeline.images.batches import WorkStopped
from pipeline.images.decoding.decode import Decoded
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.planning.plan import make_plan
from pipeline.run.resources import Slot
from schemas.options import UpsampleConfig
from tests.helpers.killing import wait_for
from tests.helpers.photographs import write_random_images
from tests.helpers.scripted_workers import KILLS, RAISES
from tests.helpers.upsample_jobs import config, shard_bytes
from tests.pipeline.run.decoding.loaders_elsewhere import (
    RECIPE,
    ROWS,
    Elsewhere,
    WaitsForever,
    all_of,
    built_loader,
    failing_loader,
    make_worker_that_starves,
    plain,
    poisoned_loader,
    references,
    slow_loader,
)

# Ray's own files and sockets are left to the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, a node with a GPU, or so it says, and one without, of one CPU."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[4]), prepend=os.pathsep)  # for tests.helpers
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, of which one is damaged and one is gone."""
    folder = write_random_images(tmp_path_factory.mktemp("elsewhere") / "images", ROWS, (150, 170))
    (folder / "05.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "16.png").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "batch_size"), [(0, 3), (1, 3), (9, 3), (20, 3), (20, 7), (20, 64)])
def test_the_batches_are_the_same(cluster: Any, images: Path, rows: int, batch_size: int) -> None:
    table, crashed = references(images, rows), {3: "it crashes", 4: "so does this"} if rows > 4 else {}
    elsewhere = Elsewhere(batch_size)
    assert all_of(elsewhere.loader, table, crashed) == all_of(RECIPE.loader(batch_size, 2), table, crashed)
    read_again = min(batch_size, 20 - 16 // batch_size * batch_size) if rows > 16 else 0  # with the file that is gone
    assert elsewhere.images == rows - read_again


@pytest.mark.slow
def test_batches_are_as_writable_as_those_from_here(cluster: Any, images: Path) -> None:
    batch = next(Elsewhere(3).loader.batches(references(images, 3), StageSeconds()))
    batch.pixels[0] = 7
    assert isinstance(batch.decoded[0], Decoded)
    assert (batch.decoded[0].pixels == 7).all()  # a view: they are not in memory twice


@pytest.mark.slow
def test_seconds_of_the_stages_are_counted_here(cluster: Any, images: Path) -> None:
    elsewhere, seconds, table = Elsewhere(3, partial(slow_loader, 0.05)), StageSeconds(), references(images, 12)
    assert len(list(elsewhere.loader.batches(table, seconds))) == 4
    assert elsewhere.images == 12
    assert 12 * 0.05 <= seconds.total()["decode"] < 60
    assert seconds.total().keys() == {"read", "decode"}


@pytest.mark.slow
@pytest.mark.parametrize(("poisoned", "said"), [(KILLS, "died|crash"), (RAISES, "a bug in the decoder")])
def test_a_process_that_fails_in_the_middle_costs_nothing(
    cluster: Any, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, poisoned: bytes, said: str
) -> None:
    """With SIGKILL in one case; the decoder here has no such bug."""
    for path in images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() + (poisoned if path.name == "13.png" else b""))
    elsewhere, table = Elsewhere(2, partial(poisoned_loader, 2)), references(tmp_path)
    assert all_of(elsewhere.loader, table, {2: "x", 18: "y"}) == all_of(RECIPE.loader(2, 2), table, {2: "x", 18: "y"})
    assert 0 < elsewhere.images <= 12
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "on a node without a GPU failed, going on here" in warnings[0]
    assert any(word in warnings[0] for word in said.split("|"))


@pytest.mark.slow
@pytest.mark.parametrize("error", [StorageUnavailable, JobError, WrongClock, OSError])
def test_errors_are_those_of_this_node(cluster: Any, images: Path, error: type[Exception]) -> None:
    """A node that cannot read says nothing about the shard; a storage that answers neither is told as it is."""
    make, table = partial(failing_loader, 4, error), references(images)
    assert all_of(Elsewhere(4, make).loader, table) == all_of(RECIPE.loader(4, 2), table)
    with pytest.raises(error, match="nobody answers"):
        all_of(Elsewhere(4, make, here=make()).loader, table)


@pytest.mark.slow
def test_a_task_that_hangs_is_ended(cluster: Any, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere, table = Elsewhere(4, partial(slow_loader, 3600.0), silence_s=3.0), references(images)
    assert all_of(elsewhere.loader, table) == all_of(RECIPE.loader(4, 2), table)
    assert "nothing came for 3 s" in caplog.text
    again = Elsewhere(4)  # its CPU is free again
    all_of(again.loader, table)
    assert again.images == 16


@pytest.mark.slow
def test_without_a_free_cpu_it_is_decoded_here(cluster: Any, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    occupied = Elsewhere(2).loader.batches(references(images), StageSeconds())
    next(occupied)  # its task waits for its batches to be taken
    elsewhere, table = Elsewhere(4, place_s=1.0), references(images, 12)
    begun = time.monotonic()
    assert all_of(elsewhere.loader, table) == all_of(RECIPE.loader(4, 2), table)
    assert elsewhere.images == 0
    all_of(elsewhere.loader, table)  # which does not try again so soon
    assert time.monotonic() - begun < 120
    assert caplog.text.count("have no CPU free at times") == 1
    occupied.close()


@pytest.mark.slow
def test_it_stops(cluster: Any, images: Path) -> None:
    elsewhere, table = Elsewhere(4, partial(slow_loader, 3600.0)), references(images)
    timer = Timer(1.0, elsewhere.loader.stop.set)
    timer.start()
    with pytest.raises(WorkStopped):
        next(elsewhere.loader.batches(table, StageSeconds()))
    timer.join()
    again = Elsewhere(4)  # its CPU is free again
    all_of(again.loader, table)
    assert again.images == 16


@pytest.mark.slow
def test_a_worker_that_is_killed_leaves_nothing_behind(cluster: Any, images: Path, tmp_path: Path) -> None:
    import ray

    worker: Any = ray.remote(WaitsForever).remote()
    worker.begin.remote(references(images), tmp_path / "decoding")
    wait_for((tmp_path / "decoding").exists)
    ray.kill(worker)
    again = Elsewhere(4)  # its CPU is free again
    all_of(again.loader, references(images))
    assert again.images == 16


@pytest.mark.slow
def test_it_goes_elsewhere_only_while_the_device_starves(cluster: Any, images: Path) -> None:
    starving, table = False, references(images, 8)
    elsewhere = Elsewhere(4, starving=lambda: starving, least_here=1)
    all_of(elsewhere.loader, table)
    starving = True
    all_of(elsewhere.loader, table)  # the only one
    assert elsewhere.images == 0
    one = elsewhere.loader.batches(table, StageSeconds())
    next(one)
    all_of(elsewhere.loader, table)
    assert elsewhere.images == 8
    one.close()
    all_of(elsewhere.loader, table)
    assert elsewhere.images == 8


@pytest.mark.slow
def test_only_nodes_with_cpus_and_without_gpus_are_used(cluster: Any) -> None:
    from pipeline.run.ray.cluster import living_nodes
    from pipeline.run.ray.decoding.elsewhere import _NodesWithoutGpu

    assert sorted((node.cpus, node.gpus) for node in living_nodes()) == [(0, 0), (1, 0), (1, 1)]
    assert _NodesWithoutGpu()() == [node.name for node in living_nodes() if (node.cpus, node.gpus) == (1, 0)]


@pytest.mark.slow
def test_only_workers_on_gpus_do_it(cluster: Any) -> None:
    import ray

    cases = [("cpu", True), ("cuda", True), ("cuda", False)]
    names = ray.get([ray.remote(built_loader).remote(device, allowed) for device, allowed in cases])
    assert names == ["BatchLoader", "ElsewhereLoader", "BatchLoader"]


@pytest.mark.slow
def test_a_node_that_is_lost_costs_nothing(cluster: Any, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    elsewhere, table = Elsewhere(3, partial(slow_loader, 0.3), nodes=lambda: [node.node_id]), references(images)
    batches, found = elsewhere.loader.batches(table, StageSeconds()), []
    for batch in batches:
        found.append(plain(batch))
        if len(found) == 1:
            cluster.remove_node(node, allow_graceful=False)
    assert found == all_of(RECIPE.loader(3, 2), table)
    assert 0 < elsewhere.images < 12
    assert "on a node without a GPU failed, going on here" in caplog.text
    nowhere = Elsewhere(3, nodes=lambda: [node.node_id], place_s=1.0)  # its name is known a little longer
    assert all_of(nowhere.loader, table) == found
    assert nowhere.images == 0


@pytest.mark.slow
def test_a_job_writes_the_same_bytes(
    cluster: Any, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from densefeat import FeatureStore
    from densefeat.storage.objects import Objects
    from pipeline.run.make_shards import make_shards
    from pipeline.run.preparation.prepare import prepare
    from pipeline.run.ray.cluster import living_nodes
    from pipeline.run.ray.workers import RayWorkers
    from pipeline.run.shard_worker import make_worker

    (with_gpu,) = (node.name for node in living_nodes() if node.gpus)
    for name, make in (("here", make_worker), ("elsewhere", make_worker_that_starves)):
        plan = make_plan(config(images, tmp_path / name, workers=1, shard_images=5))
        objects = Objects(plan.config.store)
        spec = plan.spec.on("cpu", 1)
        with RayWorkers(spec, [Slot(1, 0, with_gpu)], make=make, first_wait_s=0.05) as workers:
            encoding = prepare(plan, objects, workers)
            made, given_up = make_shards(plan, objects, workers, encoding, list(plan.shards), [])
        assert not given_up
        assert len(made) == 4
        said = capfd.readouterr()
        assert ("decoding on nodes without a GPU too" in said.out + said.err) == (name == "elsewhere")
    assert shard_bytes(tmp_path / "here") == shard_bytes(tmp_path / "elsewhere")
    assert FeatureStore(tmp_path / "here").index.equals(FeatureStore(tmp_path / "elsewhere").index)


def test_the_option_reaches_workers_and_not_the_store(images: Path, tmp_path: Path) -> None:
    plans = [make_plan(config(images, tmp_path / "store", decode_elsewhere=allowed)) for allowed in (True, False)]
    assert [plan.spec.decode_elsewhere for plan in plans] == [True, False]
    assert [plan.spec.on("cuda", 4).decode_elsewhere for plan in plans] == [True, False]
    assert plans[0].configuration == plans[1].configuration
    on, off = (tyro.cli(UpsampleConfig, args=["--images", "x", "--store", "y", *more]).decode_elsewhere
               for more in ([], ["--no-decode-elsewhere"]))  # fmt: skip
    assert (on, off) == (True, False)
