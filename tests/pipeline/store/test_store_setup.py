"""Setting a store up: once, by many jobs together, and by jobs that die or wake up late."""

import itertools
import json
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from densefeat import FeatureStore, StoreError, layout
from densefeat.layout import FeatureLayout, step_sha256
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.store.layout import (
    claim,
    complete_setup,
    existing_store,
    finish,
)
from pipeline.store.verify import StoreCheck
from schemas.attributes import StoreAttributes
from schemas.index import pending_index
from tests.helpers.killing import FORK, before_operation, run_killed
from tests.helpers.stores import (
    ROWS,
    SHARD_ROWS,
    C,
    H,
    K,
    KnownStore,
    W,
    basis,
    known_codes,
    known_configuration,
    references,
    set_up_store,
    write_known_shard,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_a_store_can_be_set_up_once(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    with pytest.raises(FileExistsError):
        set_up_store(known.uri)
    stored = existing_store(Objects(known.uri))
    assert stored is not None
    assert stored.setup_complete
    assert stored.class_names == ("a", "b", "c")


def a_bit_apart(seed: int) -> tuple[Basis, np.ndarray]:
    """Basis and steps as another machine measures them."""
    other = basis()
    other.components[seed % K, seed % C] += np.float32(1e-7)
    other.mean[seed % C] += np.float32(1e-7)
    return other, np.linspace(0.01, 0.05, K, dtype=np.float32) * np.float32(1 + seed * 1e-6)


def attributes_of(own: Basis, step: np.ndarray) -> StoreAttributes:
    configuration = known_configuration(own.digest, fitted_on_images=5)
    return StoreAttributes(configuration, {"densefeat": "test"}, ("a",), 0.8, step_sha256(step))


FEATURES = FeatureLayout(ROWS, K, H, W, "int8", SHARD_ROWS)


def join(uri: str, seed: int) -> StoreAttributes:
    """What a job does: claim the store, or take the claim that is there; then complete the setup."""
    objects, (own, step) = Objects(uri), a_bit_apart(seed)
    with suppress(FileExistsError):
        claim(objects, attributes_of(own, step), own, step)
    return complete_setup(objects, FEATURES, pending_index(references()))


def is_set_up(uri: str, seeds: Iterable[int]) -> int:
    """Whether the store is whole and all of one job's; whose."""
    assert StoreCheck(uri).store() == []
    store = FeatureStore(uri)
    assert store.layout == FEATURES
    assert store.index["key"].to_pylist() == references()["key"].to_pylist()
    assert set(Objects(uri).list()) == SET_UP
    (seed,) = (seed for seed in seeds if np.array_equal(store.step, a_bit_apart(seed)[1]))
    assert Basis.of_store(store).digest == a_bit_apart(seed)[0].digest
    assert "setup" not in (Path(uri) / "zarr.json").read_text().replace("setup_complete", "")
    return seed


SET_UP = {
    "zarr.json", "index.parquet", "features/zarr.json", "step/zarr.json", "step/c/0", "pca/zarr.json",
    *(f"pca/{name}/{part}" for name, part in itertools.product(
        ("mean", "explained_variance", "explained_variance_ratio"), ("zarr.json", "c/0"))),
    "pca/components/zarr.json", "pca/components/c/0/0",
}  # fmt: skip


@pytest.mark.parametrize("killed_before", range(len(SET_UP) + 2))
def test_a_setup_that_died_is_completed_as_it_was_begun(tmp_path: Path, killed_before: int) -> None:
    uri = str(tmp_path / "store")
    killed = run_killed(killed_before, lambda: join(uri, 1))
    assert killed is (killed_before <= len(SET_UP))
    if 0 < killed_before <= len(SET_UP):
        stored = existing_store(Objects(uri))
        assert stored is not None
        assert not stored.setup_complete
        with pytest.raises(StoreError, match="still being set up"):
            FeatureStore(uri)
    join(uri, 2)
    assert is_set_up(uri, (1, 2)) == (1 if killed_before else 2)


def join_together(uri: str, seed: int, barrier: Barrier) -> None:
    barrier.wait(60)
    join(uri, seed)


@pytest.mark.parametrize("turn", range(3))
def test_many_jobs_set_up_one_store(tmp_path: Path, turn: int) -> None:
    uri, seeds = str(tmp_path / "store"), range(1, 5)
    barrier = FORK.Barrier(len(seeds))
    children = [FORK.Process(target=join_together, args=(uri, seed, barrier)) for seed in seeds]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    is_set_up(uri, seeds)


def join_late(uri: str, stopped_before: int) -> None:
    before_operation(stopped_before, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    join(uri, 1)


@pytest.mark.parametrize("stopped_before", [1, 5, len(SET_UP)])
def test_a_job_that_wakes_up_late_spoils_nothing(tmp_path: Path, stopped_before: int) -> None:
    """Stopped amid its setup, it goes on when others have completed that and the whole store."""
    known = KnownStore(str(tmp_path / "store"), known_codes(), None, basis(), [])
    sleeper = FORK.Process(target=join_late, args=(known.uri, stopped_before))
    sleeper.start()
    os.waitpid(sleeper.pid or 0, os.WUNTRACED)
    known.configuration_hash = join(known.uri, 2).hash
    finish(Objects(known.uri), [write_known_shard(known, shard) for shard in range(3)])
    before = {path: path.read_bytes() for path in Path(known.uri).rglob("*") if path.is_file()}
    os.kill(sleeper.pid or 0, signal.SIGCONT)
    sleeper.join(60)
    assert {path: path.read_bytes() for path in Path(known.uri).rglob("*") if path.is_file()} == before
    assert "pending" not in FeatureStore(known.uri).index["status"].to_pylist()


def test_a_claim_of_an_earlier_version_needs_a_person(tmp_path: Path) -> None:
    objects, (own, step) = Objects(tmp_path), a_bit_apart(1)
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes_of(own, step).to_dict()}
    objects.put(layout.ATTRIBUTES, json.dumps(group).encode())
    with pytest.raises(JobError, match="--overwrite"):
        complete_setup(objects, FEATURES, pending_index(references()))
