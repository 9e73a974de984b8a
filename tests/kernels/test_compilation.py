"""What is compiled for the CPU is kept where it can be, and runs all the same where it cannot."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels import compilation

ROOT = Path(__file__).parents[2]
NOWHERE = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "PYTHONDONTWRITEBYTECODE": "1"}
SAID = "each process compiles again. Set NUMBA_CACHE_DIR"

TWICE = """
import numpy as np
from kernels.compilation import compiled

@compiled(fastmath={"contract"})
def twice(x):
    return x + x"""

EVERY_KERNEL = """
import torch
from kernels import multiview
from kernels.jbu import bilateral_stage, explain
from kernels.dispatch import kind
from kernels.multiview.views import ViewMatrices
from kernels.window.sum import window_sum
source, guidance = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)
bilateral_stage(source, guidance, 1.0, 0.1)
rows = torch.tensor([0, 1])
assert (window_sum(torch.ones(1, 3, 3, 2), torch.ones(1, 2, 2, 2), rows, rows) == 4).all()
halved = torch.eye(4).repeat_interleave(2, 1)[None] / 2
views = ViewMatrices(halved, halved)
solved = multiview.solve(
    torch.ones(1, 1, 2, 4, 4), views, guidance, torch.zeros(1, 2, 8, 8), regularisation=1e-3, iterations=5
)
torch.testing.assert_close(solved.features, torch.ones(1, 2, 8, 8), rtol=0, atol=1e-3)
print(explain(kind(source)))
"""


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NUMBA_CACHE_DIR", "PYTHONPATH", "XDG_CACHE_HOME")
    }
    environment = inherited | {"TRITON_INTERPRET": "0"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def run_twice(folder: Path, before: str = "", after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Call compiled functions of a module in ``folder`` in a process of their own."""
    (folder / "doubling.py").write_text(TWICE)
    call = "import doubling\nfor dtype in ('f4', 'f8'): assert doubling.twice(np.ones(3, dtype)).tolist() == [2] * 3"
    code = "\n".join(["import numpy as np", before, call, after])
    return python(code, folder, **{"PYTHONPATH": str(ROOT), **environment})


def call_twice(folder: Path, *dtypes: str) -> int:
    """As a new process would, import that module and call its function; returns how often code was found."""
    (folder / "doubling.py").write_text(TWICE)
    spec = importlib.util.spec_from_file_location("doubling", folder / "doubling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for dtype in dtypes:
        assert module.twice(np.ones(3, dtype)).tolist() == [2] * 3
    return sum(module.twice.stats.cache_hits.values())


def kept(folder: Path) -> list[Path]:
    """Files of compiled code there."""
    return sorted(path for path in folder.rglob("doubling.*.nb?"))


@pytest.fixture
def read_only(tmp_path):
    """A folder of sources beside which nothing can be kept, even by root."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "__pycache__").touch()
    return folder


def test_every_kernel_is_compiled_by_this_function():
    """No other use of numba's decorators, but by functions that become part of others and are never kept."""
    decorators = {"jit", "njit", "vectorize", "guvectorize", "stencil", "cfunc"}
    for file in (ROOT / "kernels").rglob("*.py"):
        if file.name == "compilation.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", None))
            module = getattr(getattr(called, "value", None), "id", "numba")
            if name in decorators and module == "numba":
                assert [keyword.arg for keyword in node.keywords] == ["forceinline"], f"{file}:{node.lineno}"


def test_every_kernel_where_nothing_can_be_written(tmp_path):
    """A read-only checkout, without a home."""
    for package in ("kernels", "schemas"):
        for file in (ROOT / package).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            (copy.parent / "__pycache__").touch()
            copy.write_bytes(file.read_bytes())
    done = python(EVERY_KERNEL, tmp_path, **NOWHERE)
    assert done.stderr.count(SAID) == 1
    assert done.stdout.startswith("cpu")


@pytest.mark.parametrize("place", ["__pycache__", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_it_is_kept_in_the_first_place_that_can_be_written(tmp_path, place):
    sources, caches = tmp_path / "sources", tmp_path / "caches"
    sources.mkdir()
    if place == "__pycache__":
        caches = sources / "__pycache__"
    elif place != "NUMBA_CACHE_DIR":  # which goes before all others
        (sources / "__pycache__").touch()
    environment = {**NOWHERE, "NUMBA_CACHE_DIR": "/proc/none", place: str(caches)}
    if place == "HOME":
        environment.pop("XDG_CACHE_HOME")
    first = run_twice(sources, **environment)
    files = {path: path.stat().st_mtime_ns for path in kept(tmp_path)}
    assert len(files) == 3  # an index and two dtypes
    assert all(path.is_relative_to(caches) for path in files)
    again = run_twice(sources, after="assert sum(doubling.twice.stats.cache_hits.values()) == 2", **environment)
    assert {path: path.stat().st_mtime_ns for path in kept(tmp_path)} == files
    assert not first.stderr + again.stderr


def test_what_is_kept_is_named_after_what_it_is(tmp_path):
    """Two processes that keep two things at once, on one machine or on two that share a disk, cannot mix them up."""

    def names(*order: str) -> dict[str, set[str]]:
        """Name of the code of each dtype, if they are compiled in this order."""
        seen: set[str] = set()
        found = {}
        folder = tmp_path / order[0]
        folder.mkdir()
        for dtype in order:
            call_twice(folder, dtype)
            found[dtype] = code(folder) - seen
            seen |= found[dtype]
        return found

    def code(folder: Path) -> set[str]:
        return {path.name for path in kept(folder) if path.suffix == ".nbc"}

    here = names("f4", "f8")
    assert here == names("f8", "f4")
    assert len(here["f4"] | here["f8"]) == 2
    (tmp_path / "generic").mkdir()
    run_twice(tmp_path / "generic", NUMBA_CPU_NAME="generic")
    assert not code(tmp_path / "generic") & (here["f4"] | here["f8"])


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_damaged_files_are_made_anew(tmp_path, caplog, suffix, left):
    assert call_twice(tmp_path, "f4", "f8") == 0
    whole = {path: path.read_bytes() for path in kept(tmp_path)}
    for path, data in whole.items():
        if path.suffix == suffix:
            path.write_bytes(data[:left])
    assert call_twice(tmp_path, "f4", "f8") == 0
    assert kept(tmp_path) == list(whole)
    assert call_twice(tmp_path, "f4", "f8") == 2
    assert not caplog.messages


def test_files_that_can_neither_be_read_nor_replaced(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compilation, "_warned", False)
    call_twice(tmp_path, "f4")
    for path in kept(tmp_path):
        path.unlink()
        path.mkdir()
        (path / "file").touch()
    assert call_twice(tmp_path, "f4", "f8") == 0
    (message,) = caplog.messages
    assert SAID in message
    assert f"{tmp_path / '__pycache__'} cannot be used (IsADirectoryError" in message


def test_a_full_disk(tmp_path):
    full = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
"""
    done = run_twice(tmp_path, before=full, PYTHONDONTWRITEBYTECODE="1")
    assert done.stderr.count(SAID) == 1
    assert not [path for path in kept(tmp_path) if path.suffix == ".nbc"]


def test_an_edit_of_another_file_of_the_package_counts(tmp_path):
    """Of an inlined function: numba looks at the file of the caller only."""
    (tmp_path / "whole.py").write_text(
        "from kernels.compilation import compiled\nfrom parts import part\n\n@compiled\ndef whole(x): return part(x)\n"
    )
    for edit, expected in (("x + 1", 11), ("x + 2", 12), ("x + 1", 11)):
        (tmp_path / "parts.py").write_text(
            f"from numba import njit\n@njit(forceinline=True)\ndef part(x):\n    return {edit}\n"
        )
        done = python("import whole; print(whole.whole(10))", tmp_path, PYTHONPATH=str(ROOT))
        assert done.stdout == f"{expected}\n"


def test_without_compilation_functions_are_python(read_only):
    done = run_twice(read_only, NUMBA_DISABLE_JIT="1", **NOWHERE)
    assert not done.stderr
