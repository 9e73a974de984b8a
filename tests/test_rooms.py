"""The rooms of the code: what each may import, how large a file and a folder may be."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("densefeat", "schemas", "kernels", "pipeline", "jobs", "benchmarks", "tests")
# Each room of the pipeline may import those before it, and itself.
ROOMS = ["errors", "io", "reporting", "images", "features", "views", "upsamplers", "store", "run", "train", "evaluate"]
OURS = {
    "densefeat": set(),
    "schemas": {"densefeat"},
    "kernels": {"densefeat"},  # the definition of a step that readers of stores take too
    "pipeline": {"densefeat", "schemas", "kernels"},
    "jobs": {"densefeat", "schemas", "kernels", "pipeline"},
}
WITH_RAY = {"pipeline.run.ray", "pipeline.train.ray_train", "jobs.command_line"}


def modules(package: str) -> dict[str, Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def imports(file: Path) -> Iterator[str]:
    """All that a file imports, at its head or within functions; for types alone too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_those_below(package: str) -> None:
    allowed = OURS[package] | {package}
    others = {f"{name}: {imported}" for name, file in modules(package).items() for imported in imports(file)
              if (top := imported.partition(".")[0]) in PACKAGES and top not in allowed}  # fmt: skip
    assert not others


def test_rooms_import_only_those_before_them() -> None:
    pipeline = modules("pipeline")
    assert {name.split(".")[1] for name in pipeline if name != "pipeline"} == set(ROOMS)
    upwards = set()
    for name, file in pipeline.items():
        if name == "pipeline":
            continue
        own = ROOMS.index(name.split(".")[1])
        for imported in imports(file):
            if within(imported, "pipeline") and ROOMS.index(imported.split(".")[1]) > own:
                upwards.add(f"{name}: {imported}")
    assert not upwards


def test_only_some_know_ray() -> None:
    everywhere = {**modules("pipeline"), **modules("jobs"), **modules("schemas"), **modules("kernels")}
    knowing = {name for name, file in everywhere.items() if any(within(i, "ray") for i in imports(file))}
    assert not {name for name in knowing if not any(within(name, allowed) for allowed in WITH_RAY)}


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_read_in_one_sitting(package: str) -> None:
    long = {name: lines for name, file in modules(package).items() if (lines := file.read_text().count("\n")) > 350}
    assert not long


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_are_seen_at_a_glance(package: str) -> None:
    counts: dict[str, int] = {}
    for folder in {ROOT / package, *(file.parent for file in modules(package).values())}:
        entries = [entry for entry in folder.iterdir() if entry.name not in ("__init__.py", "__pycache__")]
        counts[str(folder.relative_to(ROOT))] = len(entries)
    assert not {folder: count for folder, count in counts.items() if count > 14}


def test_every_room_says_what_it_is_for() -> None:
    rooms = [file for package in PACKAGES[:-1] for file in modules(package).values() if file.name == "__init__.py"]
    silent = [file for file in rooms if len(ast.get_docstring(ast.parse(file.read_text())) or "") < 20]
    assert not silent


def test_the_readmes_tree_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text().partition("## The tree")[2]
    shown: dict[str, set[str]] = {}
    package = ""
    for line in re.search(r"```\n(.*?)```", text, re.DOTALL)[1].splitlines():  # type: ignore[index]
        names = re.match(r" *((?:\w+/ ?)+)", line)[1].split()  # type: ignore[index]
        if line.startswith(" "):
            shown[package] |= set(names)
        else:
            (package,) = names
            shown[package] = set()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders: dict[str, set[str]] = {}
    for parts in (Path(file).parts for file in tracked):
        if len(parts) > 1 and not parts[0].startswith("."):
            folders.setdefault(f"{parts[0]}/", set()).update({f"{parts[1]}/"} if len(parts) > 2 else ())
    assert shown == folders
