"""Shared entry point of all jobs: parse options, set up logging, turn errors into messages and exit codes.

Exit codes: 0: done; 1: the result is incomplete (too many failed rows, shards given up, a damaged or unfinished store,
a diverged training); 2: cannot be done as requested; 70: internal error in densefeat; 130: interrupted.
"""

import importlib.metadata
import io
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
    """Parse the command line into a ``config_class``, run ``job`` with it, and exit with the job's code.

    Args:
        config_class: dataclass whose fields are the options.
        job: returns an exit code.
        description: text for ``--help``.
        interrupted: message for an interrupted job, unless the ``KeyboardInterrupt`` that the job raises has a message.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may hold bytes that are no text
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for ours in ("__main__", "densefeat", *_APPLICATION):
        logging.getLogger(ours).setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
    stop = _Stop()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)  # clusters send it; the job ends as on Ctrl-C, and says how to continue
    try:
        config = _parsed(config_class, description)
        warn_of_name_collisions()
        code = job(config)
    except DensefeatError as error:
        _refuse(error)
    except KeyboardInterrupt as error:
        logger.error("interrupted: %s", error if error.args else interrupted)
        _exit_at_once(INTERRUPTED)
    except Exception:
        logger.exception("internal error; please report it with the traceback below")
        code = FAULT
    sys.exit(code)


def _parsed(config_class: type[Config], description: str) -> Config:
    try:
        return tyro.cli(config_class, description=description.replace("::\n\n", ":\n"))  # reST's literal blocks
    except ValueError as error:  # from the configuration's checks
        _refuse(error)
    except BrokenPipeError:  # the reader of --help has ended: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def warn_of_name_collisions() -> None:
    """Warn of installed distributions that have a top-level package with the name of one of the application's.

    The application's packages come first on the path when a job runs from the checkout. Other code that imports the
    distribution's package then gets the application's.
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
    """Signal handler: the first signal interrupts the job, the second ends the process."""

    _SAME_S = 0.5  # one Ctrl-C may arrive twice: from the terminal, and from a parent process that forwards it

    def __init__(self) -> None:
        self._first_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            # Not with logging: the signal may have arrived while a log message was being written.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping; interrupt again to exit at once\n")
            raise KeyboardInterrupt
        if now - self._first_at > self._SAME_S:
            os._exit(INTERRUPTED)


def _exit_at_once(code: int) -> NoReturn:
    """Exit without waiting for threads: their work may take minutes, and its results are not needed."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(REFUSED)
