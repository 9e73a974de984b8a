"""What ``ray job submit --working-dir .`` sends to a cluster: what the job needs, and little else."""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
APPLICATION = ("densefeat", "jobs", "kernels", "pipeline", "schemas")
MOST_BYTES = 2_500_000  # Ray does not compress it; 1.8 MB when this was written


def git(*arguments: str, cwd: Path = ROOT) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Ray packs a checkout in which people have worked, without what newer versions leave out by themselves."""
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path_factory.mktemp("checkout")
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, checkout / name)
    git("init", "--quiet", cwd=checkout)
    for name in (".git/objects/pack/big.pack", ".venv/lib/big.so", "demo/store/c/0", "features/c/0", "build/big"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(MOST_BYTES))
    target = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(checkout), target, include_gitignore=True, logger=logging.getLogger(__name__))
    return target


def test_it_is_small(package: Path) -> None:
    assert package.stat().st_size < MOST_BYTES


def test_it_has_the_application_and_nothing_beside_it(package: Path) -> None:
    packed = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert {name for name in git("ls-files", *APPLICATION) if (ROOT / name).is_file()} <= packed
    folders = {Path(name).parts[0] for name in packed if len(Path(name).parts) > 1}
    assert folders == set(APPLICATION)


def test_the_job_starts_from_it(package: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(package).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}  # as Ray sets it
    command = [sys.executable, "jobs/upsample_imagenet.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--workers" in done.stdout
