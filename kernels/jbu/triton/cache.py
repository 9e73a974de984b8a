"""Where Triton keeps what it compiled."""

import atexit
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

import triton

__all__ = ["ensure_cache"]

logger = logging.getLogger(__name__)


@functools.cache
def ensure_cache() -> None:
    """Give Triton a folder for this process if its own cannot be written: it cannot compile without one.

    Its own is ``TRITON_CACHE_DIR``, else ``.triton/cache`` in ``TRITON_HOME``, else in the home.

    Raises:
        OSError: no temporary folder can be made either.
    """
    own = Path(triton.knobs.cache.dir)
    try:
        own.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=own).close()
    except OSError as error:
        try:
            folder = tempfile.mkdtemp(prefix="densefeat-triton-")
        except OSError:
            raise OSError(
                f"Triton cannot compile: neither {own} nor a temporary folder can be written. "
                "Set TRITON_CACHE_DIR to a folder that can be."
            ) from error
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TRITON_CACHE_DIR"] = folder
        logger.warning(
            "%s cannot be written to: each process compiles again. Set TRITON_CACHE_DIR to a folder that can be", own
        )
