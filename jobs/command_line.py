"""What all jobs do around their work: read options, set up logging, turn errors into messages and exit codes.

Exit codes: 0 done; 1 done, but too much failed, or a training diverged; 2 it cannot be done as asked; 70 a fault in
densefeat; 130 interrupted.
"""

import importlib.metadata
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
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
        interrupted: what to say to somebody who interrupts it.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    # A cluster's way to ask a job to stop; then it ends as on Ctrl-C, saying how to go on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warn_of_name_collisions()
    try:
        config = tyro.cli(config_class, description=description)
    except ValueError as error:  # from the configuration's own checks
        _refuse(error)
    try:
        code = job(config)
    except DensefeatError as error:
        _refuse(error)
    except KeyboardInterrupt:
        logger.error("interrupted: %s", interrupted)
        code = INTERRUPTED
    except Exception:
        logger.exception("this is a fault in densefeat, or of the machine; please report it with what stands here")
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


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(REFUSED)
