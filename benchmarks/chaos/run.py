"""Run a scenario: the job undisturbed, then on a cluster with faults, and compare the two stores."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.compare import differences, failed_rows, problems
from benchmarks.chaos.disturb import STALL_S, Disturber
from benchmarks.chaos.nodes import Nodes, build_wrong_clock
from benchmarks.chaos.photographs import PCA_IMAGES, Photographs, make_photographs
from benchmarks.chaos.schedule import Scenario, draw
from benchmarks.chaos.storage import BUCKET, Storage, running_storage
from tests.pipeline.run.cluster.ray_clusters import head, job_options, wait_for

__all__ = ["Outcome", "Quiet", "run"]

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
_SHARD_IMAGES = 4  # of job_options
_TURN_S, _LONGEST_S = 0.2, 1500.0
_POISON = Path(__file__).parent / "poison"


@dataclass
class Outcome:
    """What came of a scenario.

    Attributes:
        row: what was measured.
        wrong: what is not as in the undisturbed run, in words.
    """

    row: dict[str, Any]
    wrong: list[str]


Quiet = dict[tuple[int, bool, float | None], tuple[dict[str, bytes], int]]


def run(name: str, scenario: Scenario, images: int, seed: int, folder: Path, quiet: Quiet) -> Outcome:
    """Run a scenario.

    Args:
        name: of the scenario.
        scenario: what fails.
        images: number of images.
        seed: of the faults and the damages.
        folder: for logs.
        quiet: stores and exit codes of undisturbed runs with the same number of images and the same seed, by what is
            wrong with their images; what is missing is added.
    """
    photographs = make_photographs(images, poison=scenario.poison, corrupt=scenario.corrupt, seed=seed)
    with running_storage() as storage:
        options = job_options(f"s3://{BUCKET}/photographs", f"s3://{BUCKET}/store", "--pca-images", str(PCA_IMAGES))
        options = [*options, "--stall-timeout-s", f"{STALL_S:g}"]
        if scenario.share is not None:
            options += ["--max-failed-share", str(scenario.share)]
        what = scenario.poison, scenario.corrupt, scenario.share
        if what not in quiet:
            quiet[what] = _undisturbed(photographs, storage, options, folder / "undisturbed.log")
        expected, code = quiet[what]
        storage.put("photographs", photographs.files)
        shards = -(-images // _SHARD_IMAGES)
        row, wrong, ended = _disturbed(scenario, storage, options, shards, seed, folder)
        store = storage.read("store")
        wrong += [f"exit code {ended}, not {code}"] * (ended != code)
        wrong += differences(store, expected, photographs.poison) + problems("store", storage)
        again = sum(len(intents) > 1 for intents in storage.intents.values())
        row = {
            "scenario": name,
            "seed": seed,
            "images": images,
            "shards": shards,
            "workers": len(scenario.clocks_s),
            "wrong_clocks_at_start": sum(map(bool, scenario.clocks_s)),
            **row,
            "poison": len(photographs.poison),
            "corrupt": len(photographs.corrupt),
            "exit_code": ended,
            "failed_rows": failed_rows(store["index.parquet"]) if "index.parquet" in store else None,
            "shards_computed_again": again,
            "images_read_again": sum(count - 1 for count in storage.reads.values()),
            "requests": len(storage.proxy.seen),
            "requests_spoiled": dict(storage.spoiled),
            "requests_of_wrong_clocks": storage.proxy.skewed,
        }
    return Outcome(row, wrong)


def _undisturbed(
    photographs: Photographs, storage: Storage, options: Sequence[str], log: Path
) -> tuple[dict[str, bytes], int]:
    """The store that a job in one process makes without faults, by key, and its exit code; the store is moved away."""
    storage.put("photographs", photographs.undisturbed)
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, "-m", "jobs.upsample_imagenet", *options, "--workers", "0"],
            cwd=ROOT, env={**os.environ, **storage.environment(faults=False)}, stdout=file, stderr=file,
        ).returncode  # fmt: skip
    if code not in (0, 1):
        raise SystemExit(f"the undisturbed job ended with {code}:\n{log.read_text()[-3000:]}")
    store = storage.read("store")
    storage.delete("store")
    return store, code


def _disturbed(
    scenario: Scenario, storage: Storage, options: Sequence[str], shards: int, seed: int, folder: Path
) -> tuple[dict[str, Any], list[str], int | None]:
    """Run the job among faults to its end: what was measured, what went wrong, and its last exit code."""
    clocks = any(scenario.clocks_s) or "join with a wrong clock" in scenario.faults
    variables = {**storage.environment(faults=True), "PYTHONPATH": f"{_POISON}{os.pathsep}{ROOT}"}
    with head(cwd=folder) as cluster:
        nodes = Nodes(cluster, variables, build_wrong_clock(folder) if clocks else None, folder / "nodes.log")
        with nodes.ended():
            for clock_s in scenario.clocks_s:
                node = nodes.add(clock_s)
                wait_for(lambda node=node: nodes.look() and node.raylets())  # two that start at once may collide
            wait_for(lambda: cluster.count_nodes() > len(scenario.clocks_s))
            disturber = Disturber(draw(scenario, shards, seed), nodes, storage)
            environment = {**cluster.environment, **storage.environment(faults=True), "RAY_ADDRESS": cluster.address}
            begun, drivers, code = time.monotonic(), 0, None
            while code in (None, -signal.SIGKILL) and time.monotonic() - begun < _LONGEST_S:
                log = folder / f"driver_{drivers}.log"
                with _driver([*options, "--resume"], environment, log) as driver:
                    drivers += 1
                    while (code := driver.poll()) is None and time.monotonic() - begun < _LONGEST_S:
                        disturber.turn(driver)
                        time.sleep(_TURN_S)
    wrong = [] if code is not None else [f"the job still ran after {_LONGEST_S:.0f} s"]
    faults = sum(scenario.faults.values())
    if disturber.struck.total() < faults:
        wrong.append(f"{disturber.struck.total()} of {faults} faults struck before the job ended")
    row = {
        "seconds": round(time.monotonic() - begun, 1),
        "restarts": drivers - 1,
        "faults": disturber.struck.total(),
        "struck": dict(disturber.struck),
    }
    return row, wrong, code


@contextmanager
def _driver(options: Sequence[str], environment: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as file:
        command = [sys.executable, "-m", "jobs.upsample_imagenet", *options]
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()
