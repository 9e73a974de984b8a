"""Everything that can fail fails at once, for real, and the store is that of a quiet run: ``make chaos``, shortened."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.schedule import KINDS, SCENARIOS, shortened

ROOT = Path(__file__).parents[4]
SHORT = shortened(SCENARIOS["all"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the library that moves a node's clock")
def test_the_store_is_that_of_a_quiet_run() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--scenario", "all", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)
    assert set(row["struck"]) == set(KINDS)
    assert row["struck"] == SHORT.faults
    assert row["restarts"] >= SHORT.faults["kill the driver"]
    assert row["failed_rows"]["crashed"] == row["poison"] == SHORT.poison
    assert row["requests_of_wrong_clocks"] > 0
