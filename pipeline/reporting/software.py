"""Software versions, for the attributes of a store and the metadata of trained weights."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

__all__ = ["commit", "software_versions"]

_SOFTWARE = ("densefeat", "torch", "timm", "numpy", "pillow", "zarr", "numba", "ray")


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results, by name."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _SOFTWARE}}


def commit() -> str:
    """The commit of this checkout, with ``+changes`` if tracked files differ; ``unknown`` if git cannot tell."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # e.g. copied to a cluster without .git


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # densefeat itself, if the checkout is copied to the node and not installed
