"""Rows of results: one JSON object per line, each with the machine and versions it was measured on."""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def measured_on() -> dict[str, Any]:
    """Device, versions, commit and day of a measurement."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    packages = ("torch", "timm", "ray", "numpy", "zarr", "numba", "pillow")
    return {
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "day": datetime.now(UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # not every benchmark needs every package
        return None


def _commit() -> str:
    """The commit, marked if anything except results has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=RESULTS.parents[1], capture_output=True, text=True, check=True
        ).stdout.strip()

    dirty = git("status", "--short", "--", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")


def append(name: str, row: dict[str, Any]) -> None:
    """Add a row to ``results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(name: str) -> list[dict[str, Any]]:
    """All rows of ``results/NAME.jsonl``, oldest first."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def on_gpu(row: dict[str, Any]) -> bool:
    """Whether a row was measured on a GPU."""
    return str(row["device"]).startswith("NVIDIA")


def by_backbone(held_out: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Group a ``training`` row's measurements on held-out views by backbone, in the order of their steps."""
    names = dict.fromkeys(measured["backbone"] for measured in held_out)
    return {name: [measured for measured in held_out if measured["backbone"] == name] for name in names}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
