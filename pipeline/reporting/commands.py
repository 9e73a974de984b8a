"""Commands that a message tells the user to run."""

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["this_python"]


def this_python() -> str:
    """How a shell in this folder calls this Python: as ``python``, or by its path, relative if that is below."""
    found = shutil.which("python")
    # Not whether they are the same file: environments link to one interpreter, and differ in their packages.
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith(os.pardir) else relative)
