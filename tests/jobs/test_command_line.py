"""What every job does with a signal, an error, an end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

JOB = """
import sys, time
from dataclasses import dataclass
from jobs.command_line import run

@dataclass(frozen=True)
class Config:
    cleanup: float = 0.0
    kept: str = ""

def job(config):
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        end = time.monotonic() + config.cleanup
        while time.monotonic() < end:
            time.sleep(0.01)
        raise KeyboardInterrupt(*[config.kept] * bool(config.kept))

run(Config, job, "a job", interrupted="nothing was kept")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    script = tmp_path / "script.py"
    script.write_text(JOB)
    return script


def begin(script: Path, *options: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, str(script), *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    return job


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("options", "said"), [((), "interrupted: nothing was kept"), (("--kept", "9 shards"), "interrupted: 9 shards")]
)
def test_a_signal_stops_it_and_it_says_what_is_kept(
    script: Path, number: signal.Signals, options: tuple[str, ...], said: str
) -> None:
    job = begin(script, *options)
    job.send_signal(number)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 130
    assert said in stderr
    assert "Traceback" not in stderr


def test_a_second_signal_ends_it_at_once(script: Path) -> None:
    job = begin(script, "--cleanup", "50")
    job.send_signal(signal.SIGINT)
    time.sleep(1)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=20)
    assert job.returncode == 130
    assert "stopping; interrupt again to exit at once" in stderr
    assert "interrupted" not in stderr


def test_one_press_that_comes_twice_is_one(script: Path) -> None:
    job = begin(script, "--cleanup", "0.3")
    job.send_signal(signal.SIGINT)
    time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "interrupted: nothing was kept" in stderr


JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if "if __name__ ==" in path.read_text())
_HEAVY = ("torch", "numpy", "zarr", "pyarrow", "numba", "ray", "timm", "PIL", "matplotlib")


@pytest.mark.parametrize("job", JOBS)
def test_help_imports_nothing_that_takes_seconds(job: str) -> None:
    program = f"""
import runpy, sys
sys.argv = [{job!r}, "--help"]
try:
    runpy.run_module("jobs.{job}", run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None)
print("imported:", *(name for name in {_HEAVY!r} if name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage:")
    assert ran.stdout.splitlines()[-1] == "imported:"


def test_help_may_be_cut_off() -> None:
    help_text = [sys.executable, "-m", "jobs.upsample_imagenet", "--help"]
    with subprocess.Popen(help_text, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 128 + signal.SIGPIPE
