"""Commands in messages run as they are printed."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.reporting.commands import this_python

PREFIX = "import sys; print(sys.prefix)"


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_the_command_runs_this_environment(
    activated: bool, below: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin" if activated else "/usr/bin:/bin")
    monkeypatch.chdir(Path(sys.prefix).parent if below else tmp_path)
    command = this_python()
    assert (command == "python") == activated
    done = subprocess.run(f"{command} -c {shlex.quote(PREFIX)}", shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sys.prefix
