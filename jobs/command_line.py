"""What all jobs do around their work: read options, set up logging, turn errors into messages and exit codes.

Exit codes: 0 done; 1 done, but too much failed, or a training diverged; 2 it cannot be done as asked; 70 a fault in
densefeat; 130 interrupted.
"""

import importlib.metadata
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro

from densefeat.errors import DensefeatError

DONE, FAILED, REFUSED, FAULT, INTERRUPTED = 0, 1, 2, 70, 130

_APPLICATION = ("pipeline", "kernels", "jobs", "schemas")

logger = logging.getLogger(__name__)
Config = TypeVar("Config")


def run(
    config_class: type[Config], job: Callable[[Config], int], description: str, *, interrupted: str = "stopped"
) -> None:
    """Read the command line into ``config_class``, run ``job`` on it, exit with its code.

    Args:
        config_class: its fields are the options.
        job: returns an exit code.
        description: for ``--help``.
        interrupted: what to say to somebody who interrupts it, unless the ``KeyboardInterrupt`` that the job raises
            says what it has kept.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    stop = _Stop()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)  # a cluster's way to ask: it ends as on Ctrl-C, saying how to go on
    try:
        config = tyro.cli(config_class, description=description)
    except ValueError as error:  # from the configuration's own checks
        _refuse(error)
    warn_of_name_collisions()
    try:
        code = job(config)
    except DensefeatError as error:
        _refuse(error)
    except KeyboardInterrupt as error:
        logger.error("interrupted: %s", error if error.args else interrupted)
        _leave(INTERRUPTED)
    except Exception:
        logger.exception("internal error; please report it with the traceback below")
        code = FAULT
    sys.exit(code)


def warn_of_name_collisions() -> None:
    """Say which installed distributions own one of the application's top-level names.

    Ours come first on the path as long as the job runs from the checkout; somebody else's import of theirs gets ours.
    """
    owners: dict[str, Any] = dict(importlib.metadata.packages_distributions())
    for name in _APPLICATION:
        for owner in owners.get(name, ()):
            logger.warning(
                "the installed package %s also has a top-level %r; this job uses %s", owner, name, _checkout() / name
            )


def _checkout() -> Path:
    return Path(__file__).parents[1]


class _Stop:
    """What a signal to stop does: the first interrupts the job, the second ends the process."""

    _SAME_S = 0.5  # one Ctrl-C may come twice: from the terminal, and from a parent that passes it on

    def __init__(self) -> None:
        self._asked_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            # Not by logging: the signal may have come amid a line of it.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping; once more to exit at once\n")
            raise KeyboardInterrupt
        if now - self._asked_at > self._SAME_S:
            os._exit(INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """End without waiting for threads: what one of them is at may take minutes, and is not going to be used."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(REFUSED)
