"""Claim: from a clone to a picture in minutes, and in seconds when repeated.

    python -m benchmarks.jobs.demo

Clones this checkout's last commit and runs `make demo` there twice, starting with an empty package cache.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks import rows

ROOT = Path(__file__).parents[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "densefeat"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {**os.environ, "PIP_CACHE_DIR": f"{folder}/pip", "UV_CACHE_DIR": f"{folder}/uv"}
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            subprocess.run(["make", "demo"], cwd=clone, env=environment, check=True)
            seconds.append(round(time.monotonic() - start, 1))
    installer = "uv" if shutil.which("uv") else "pip"
    row = {"first_s": seconds[0], "again_s": seconds[1], "installer": installer, **rows.measured_on()}
    rows.append("demo", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
