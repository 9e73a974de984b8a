"""``docs/cluster/slurm.sh`` as Slurm runs it, with a stand-in for ``srun`` that starts a process on this machine."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tyro

from densefeat import FeatureStore
from schemas.options import UpsampleConfig
from tests.helpers.killing import wait_for
from tests.pipeline.run.cluster.ray_clusters import ended_with_children, job_options, link_many

ROOT = Path(__file__).parents[4]
SCRIPT = ROOT / "docs" / "cluster" / "slurm.sh"
# Takes what the script passes, and nothing else; there is one more node.
SRUN = f"""#!{sys.executable}
import argparse, os

parser = argparse.ArgumentParser(allow_abbrev=False)
for option in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "wait", "kill-on-bad-exit"):
    parser.add_argument("--" + option, type=int, required=True)
parser.add_argument("--exclude", required=True)
parser.add_argument("--no-kill", action="store_true")
parser.add_argument("command", nargs=argparse.REMAINDER)
options = parser.parse_args()
assert options.nodes == options.ntasks == options.ntasks_per_node == 1
assert options.exclude == os.environ["SLURMD_NODENAME"]
os.execvp(options.command[0], options.command)
"""


def test_slurm_reads_all_of_its_options() -> None:
    lines = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(asked) > 5
    assert max(asked) < first_command  # it reads no further
    assert os.access(SCRIPT, os.X_OK)


def test_the_command_at_its_head_is_one_of_the_job() -> None:
    command = re.search(r"sbatch .*slurm\.sh (.*)", SCRIPT.read_text())
    assert command is not None
    assert tyro.cli(UpsampleConfig, args=["--resume", *shlex.split(command[1])]).device == "cuda"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The environment of a batch script on the first of two nodes; yields the folder of Ray's files."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(0o755)
    number = os.getpid()
    for name, value in {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURMD_NODENAME": "first",
    }.items():
        monkeypatch.setenv(name, value)
    folder = Path(f"/tmp/ray-{number}")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def left_over(folder: Path) -> list[list[str]]:
    """Commands of Ray's processes that have their files there."""
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in running if any(str(folder) in word for word in command)]


@pytest.mark.slow
def test_it_does_the_job(slurm: Path, photographs: Path, tmp_path: Path) -> None:
    options = job_options(photographs, tmp_path / "store")
    done = subprocess.run([SCRIPT, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 nodes are there" in done.stderr
    assert len(FeatureStore(tmp_path / "store")) == 12
    assert left_over(slurm) == []


@pytest.mark.slow
def test_it_ends_with_the_code_of_the_job(slurm: Path, tmp_path: Path) -> None:
    options = job_options("/nothing/here", tmp_path / "store")
    refused = subprocess.run([SCRIPT, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "/nothing/here" in refused.stderr
    assert left_over(slurm) == []


@pytest.mark.slow
def test_it_stops_the_job_before_its_time_is_over(slurm: Path, photographs: Path, tmp_path: Path) -> None:
    many, store = tmp_path / "many", tmp_path / "store"
    link_many(photographs, many)
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen([SCRIPT, *job_options(many, store)], cwd=tmp_path, stdout=log, stderr=log)
    with ended_with_children(script):
        wait_for(lambda: any((store / "_ledger").glob("*.parquet")))
        script.send_signal(signal.SIGTERM)  # to the script alone: --signal=B:TERM
        said = f"exit code {script.wait(120)}\n{(tmp_path / 'log').read_text()}"
    assert script.returncode == 130, said
    assert re.search(r"interrupted: [1-9]\d* of 90 shards are finished and kept; continue with --resume", said)
    assert left_over(slurm) == []
