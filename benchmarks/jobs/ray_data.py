"""Claim: a shard that always fails costs its attempts and not the job; a killed job redoes only what was in progress.

    python -m benchmarks.jobs.ray_data
    python -m benchmarks.jobs.ray_data --cases restart

The same 20 shards of half a second each, on two workers of Ray on this machine: with densefeat's scheduling
(`pipeline.run.ray.workers.RayWorkers`), and with Ray Data (a range in 20 blocks, ``map_batches`` with an actor pool,
``write_parquet``), as it is and with the most tolerant settings that it has: `TOLERANT`, and ``max_task_retries=2``.
Shard 3 always raises, kills its process, or hangs. In the last case, nothing fails; the driver and its processes are
killed when half of the shards are done, and it is started again: with ``CheckpointConfig`` for Ray Data. densefeat's
shards are done when their file exists, as a store's ledger says. Shards of this case take two seconds, so that a few
results are written when the driver is killed. Each case runs in a process of its own with a limit.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import rows

SHARDS, STEP_S, BAD = 20, 0.05, 3
STEPS, STEPS_OF_RESTART = 10, 40
LIMIT_S, STALL_S = 120, 10.0
# Of `ray.data.DataContext`: errors of the function are retried twice, blocks that fail still are left out, and a run
# without any output for a time is ended. That time includes the start of the workers.
TOLERANT = {
    "retried_map_errors": True,
    "max_map_retries": 2,
    "max_errored_blocks": -1,
    "execution_no_progress_timeout_s": 30.0,
}
CASES = ("raises", "kills", "hangs", "restart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="which to run")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        system, case, folder = arguments.one
        SYSTEMS[system](Path(folder), case)
        return
    found = {system: {case: measure(system, case) for case in arguments.cases} for system in SYSTEMS}
    row = {
        "shards": SHARDS,
        "shard_s": STEPS * STEP_S,
        "shard_s_of_restart": STEPS_OF_RESTART * STEP_S,
        "limit_s": LIMIT_S,
        "stall_timeout_s": STALL_S,
        "tolerant": TOLERANT,
        "systems": found,
        **rows.measured_on(),
    }
    rows.append("ray_data", row)
    print(json.dumps(row))


def measure(system: str, case: str) -> dict[str, Any]:
    """Run a case to its end or its limit."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for part in ("started", "done", "out"):
            (folder / part).mkdir()
        if case == "restart":
            _run(system, case, folder, until=lambda: len(list((folder / "done").iterdir())) >= SHARDS // 2)
            time.sleep(10)  # until Ray's processes are gone
            kept_before = len(_kept(system, folder))
        before = _runs(folder)
        result = _run(system, case, folder)
        runs = _runs(folder)
        good = {shard: count for shard, count in runs.items() if case == "restart" or shard != BAD}
        result |= {
            "done": len(_kept(system, folder)),
            "runs_of_bad": 0 if case == "restart" else runs.get(BAD, 0),
            "redone": sum(count - 1 for count in good.values()),
        }
        if case == "restart":
            result |= {"started_before": len(before), "kept_before": kept_before}
        print(system, case, result, file=sys.stderr)
        return result


def _run(system: str, case: str, folder: Path, until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Start a driver and wait for its end; kills it at the limit, or once ``until`` is true."""
    command = [sys.executable, "-m", "benchmarks.jobs.ray_data", "--one", system, case, str(folder)]
    begun = time.monotonic()
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while driver.poll() is None and time.monotonic() - begun < LIMIT_S and not until():
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        ended = driver.poll()
        if ended is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    end = f"exit code {ended}" if ended is not None else "killed by this benchmark"
    return {"end": end, "seconds": round(seconds, 1), "message": _last_line(folder / "log")}


def _last_line(log: Path) -> str:
    """The last line that names an error, or else the last line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|given up)\b", line)]
    return [*lines, *errors][-1][:300] if lines else ""


def _runs(folder: Path) -> dict[int, int]:
    """How often each shard was begun."""
    return {int(path.name): path.stat().st_size for path in (folder / "started").iterdir()}


def _kept(system: str, folder: Path) -> set[int]:
    """Shards whose result was kept."""
    if system == "densefeat":
        return {int(path.name) for path in (folder / "done").iterdir()}
    import pyarrow.parquet as pq

    return {shard for file in (folder / "out").rglob("*.parquet") for shard in pq.read_table(file)["id"].to_pylist()}


def make(folder: Path, case: str, shard: int, on_step: Callable[[], None] = lambda: None) -> None:
    """The work of a shard."""
    with (folder / "started" / str(shard)).open("ab", buffering=0) as file:
        file.write(b"x")
    for _ in range(STEPS_OF_RESTART if case == "restart" else STEPS):
        time.sleep(STEP_S)
        on_step()
    if shard == BAD and case == "raises":
        raise ValueError("this shard cannot be made")
    if shard == BAD and case == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    if shard == BAD and case == "hangs":
        time.sleep(3600)
    (folder / "done" / str(shard)).touch()


class Worker:
    """Stands in for a `pipeline.run.feature_worker.FeatureWorker`."""

    tasks_at_once = 1

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.images_done = 0

    def make_shard(self, folder: Path, case: str, shard: int) -> int:
        make(folder, case, shard, self._step)
        return shard

    def _step(self) -> None:
        self.images_done += 1


@contextmanager
def ray() -> Iterator[None]:
    """Ray on this machine, told of eight CPUs: Ray Data needs some for reading, writing and its checkpoints besides."""
    from pipeline.run.ray import cluster

    cluster.available_cores = lambda root=Path("/"): 8
    with cluster.connected():
        yield


def with_densefeat(folder: Path, case: str) -> None:
    from benchmarks.jobs.stand_in import SPEC
    from pipeline.run.ray.workers import RayWorkers
    from pipeline.run.resources import Slot
    from pipeline.run.workers import TaskFailed

    done = {int(path.name) for path in (folder / "done").iterdir()}
    to_do = [shard for shard in range(SHARDS) if shard not in done]
    given_up = {}
    slots = [Slot(1, 0)] * 2
    with ray(), RayWorkers(SPEC, slots, stall_timeout_s=STALL_S, make=Worker) as workers:
        for task, result in workers.map(Worker.make_shard, [(folder, case, shard) for shard in to_do]):
            if isinstance(result, TaskFailed):
                given_up[to_do[task]] = f"tried {result.attempts} times; the last time: {result.reason}"
    for shard, reason in given_up.items():
        print(f"given up: shard {shard}: {reason}")
    sys.exit(1 if given_up else 0)


class Mapper:
    """A callable for ``map_batches``."""

    def __init__(self, folder: Path, case: str) -> None:
        self.folder, self.case = folder, case

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["id"]:
            make(self.folder, self.case, int(shard))
        return batch


def with_ray_data(folder: Path, case: str, *, tolerant: bool) -> None:
    from ray import data
    from ray.data.checkpoint import CheckpointConfig

    with ray():
        context = data.DataContext.get_current()
        context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(folder / "checkpoint"))
        retries: dict[str, Any] = {}
        if tolerant:
            for name, value in TOLERANT.items():
                setattr(context, name, value)
            retries["max_task_retries"] = 2
        dataset = data.range(SHARDS, override_num_blocks=SHARDS).map_batches(
            Mapper,
            fn_constructor_args=(folder, case),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=2),
            num_cpus=1,
            **retries,
        )
        dataset.write_parquet(str(folder / "out"))


SYSTEMS: dict[str, Callable[[Path, str], None]] = {
    "densefeat": with_densefeat,
    "Ray Data": partial(with_ray_data, tolerant=False),
    "Ray Data, tolerant": partial(with_ray_data, tolerant=True),
}


if __name__ == "__main__":
    main()
