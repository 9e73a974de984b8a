"""Identify a process, so that another one on the same machine can tell whether it has ended."""

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "this_process"]


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        host: name of its machine.
        pid: its number there.
        machine: identifies the boot of the machine and the namespace of the number (on Linux); None elsewhere.
        started: when it started, in ticks of the machine since it booted, which do not follow its clock; None if
            ``machine`` is None.
    """

    host: str
    pid: int
    machine: str | None
    started: int | None

    def has_ended(self) -> bool:
        """Whether the process is known to have ended: it ran on this machine, and does not run any more."""
        if self.machine is None or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass  # it runs, as another user
        state, started = _state(self.pid)
        return state in ("Z", "X") or (None not in (started, self.started) and started != self.started)


def this_process() -> Process:
    """Identify this process."""
    machine = _machine()
    return Process(socket.gethostname(), os.getpid(), machine, _state(os.getpid())[1] if machine else None)


def _machine() -> str | None:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def _state(pid: int) -> tuple[str | None, int | None]:
    """State of a process (a letter), and its start in ticks since the boot: fields 3 and 22 in proc_pid_stat(5)."""
    with suppress(OSError):
        # The name of the program comes before them, in brackets, and may hold anything.
        fields = re.sub(r".*\)", "", Path(f"/proc/{pid}/stat").read_text(errors="replace"), flags=re.DOTALL).split()
        return fields[0], int(fields[19])
    return None, None
