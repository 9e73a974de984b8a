"""What is installed, and what `ray job submit --working-dir .` packs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PLACE = re.compile(r"--(?:store|output|images|pca) ([\w./-]+[\w/])")


def commands() -> str:
    """All texts that have commands for a person."""
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    clusters = [ROOT / "ray_cluster.yaml", *(ROOT / "docs" / "cluster").iterdir()]
    files = [*documents, *clusters, *(ROOT / "jobs").glob("*.py")]
    return "\n".join(file.read_text() for file in files)


def test_what_the_documents_commands_read_and_write_is_not_packed() -> None:
    found = _PLACE.findall(commands())
    places = {
        place for place in found if ("." in place or "/" in place) and not place.startswith("/")
    }  # in the checkout
    assert {"features/", "basis.npz", "photos/", "jbu/", "features.png"} <= places
    packed = [
        place
        for place in sorted({*places, "demo/"})
        if subprocess.run(
            ["git", "check-ignore", "-q", place + ("x" if place.endswith("/") else "")], cwd=ROOT
        ).returncode
    ]
    assert packed == []


@pytest.mark.slow
def test_a_script_beside_a_checkout_called_densefeat_imports_it(tmp_path: Path) -> None:
    """Installed as `make` does it; the folder of the same name, first on the script's path, must not hide it."""
    checkout = tmp_path / "densefeat"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    python = checkout / ".venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", checkout / ".venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", checkout], check=True)
    script = tmp_path / "script.py"
    script.write_text("import densefeat\nprint(densefeat.__file__)\n")
    numpy = __import__("numpy").__file__
    environment = {**os.environ, "PYTHONPATH": str(Path(numpy).parents[1])}  # its dependencies
    done = subprocess.run([python, script], capture_output=True, text=True, env=environment, check=True)
    assert Path(done.stdout.strip()) == checkout / "densefeat" / "__init__.py"
