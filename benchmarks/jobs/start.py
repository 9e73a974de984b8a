"""Claim: a job starts about as fast as its imports, and --help and --dry-run wait for no model.

    python -m benchmarks.jobs.start --images ../shared/data/coco200/images/train

Wall and CPU seconds, medians of 5 interleaved runs, each in a new process: `import torch`, `import timm`, `--help` of
every job, and the main job on 60 photographs with the demonstration's weights: its plan, and all of it. CPU seconds are
those of the process and its children, which Ray's processes are not counted among.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import rows
from jobs.demo import BACKBONE, write_weights

ROOT = Path(__file__).parents[2]
IMAGES, RUNS = 60, 5
TORCH, TIMM = "import torch", "import timm"
PLAN, JOB, ON_RAY = "--dry-run, 60 photographs", "the job, 60 photographs", "the job on Ray, 60 photographs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of at least 60 photographs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        write_weights(weights)
        commands = {TORCH: ["-c", "import torch"], TIMM: ["-c", "import timm"]}
        commands |= {f"{name} --help": ["-m", f"jobs.{name}", "--help"] for name in _jobs()}
        job = main_job(options.images, weights)
        commands[PLAN] = [*job, f"--store={folder}/planned", "--dry-run"]
        commands[JOB] = [*job, f"--store={folder}/store", "--overwrite"]
        commands[ON_RAY] = [*commands[JOB], "--workers=1"]
        measured = _interleaved(commands)
    row = {"images": IMAGES, "runs": RUNS, "commands": measured, **rows.measured_on()}
    rows.append("start", row)
    print(json.dumps(row))


def _jobs() -> list[str]:
    """The modules of `jobs` that are programs."""
    files = sorted((ROOT / "jobs").glob("*.py"))
    return [file.stem for file in files if 'if __name__ == "__main__"' in file.read_text()]


def main_job(images: str | Path, weights: Path) -> list[str]:
    """Python's arguments for the main job on 60 photographs, with its defaults, on the CPU, but for ``--store``."""
    return [
        *("-m", "jobs.upsample_imagenet", f"--images={Path(images).resolve()}", f"--limit={IMAGES}"),
        *(f"--backbone={BACKBONE}", f"--weights={weights}", "--device=cpu"),
    ]


def _interleaved(commands: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Median wall and CPU seconds of each command, after a run of each that is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(1 + RUNS):
        for name, arguments in commands.items():
            wall_s, cpu_s = _seconds(arguments)
            if turn:
                wall[name].append(wall_s)
                cpu[name].append(cpu_s)
    return {
        name: {"wall_s": round(statistics.median(wall[name]), 3), "cpu_s": round(statistics.median(cpu[name]), 3)}
        for name in commands
    }


def _seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run of Python."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    wall_s, after = time.perf_counter() - start, os.times()
    if done.returncode:
        sys.exit(f"{arguments} failed with exit code {done.returncode}:\n{done.stderr}")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return wall_s, cpu_s


if __name__ == "__main__":
    main()
