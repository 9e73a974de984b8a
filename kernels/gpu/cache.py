"""The folder of Triton's cache of compiled kernels."""

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
    """Set a temporary cache folder for this process if Triton's is not writable: it cannot compile without one.

    Triton's folder is ``TRITON_CACHE_DIR``, else ``.triton/cache`` in ``TRITON_HOME`` or in the home folder.

    Raises:
        OSError: no temporary folder can be created either.
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
                f"Triton cannot compile: neither {own} nor a temporary folder is writable. "
                "Set TRITON_CACHE_DIR to a writable folder."
            ) from error
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TRITON_CACHE_DIR"] = folder
        logger.warning(
            "%s is not writable: each process compiles again. Set TRITON_CACHE_DIR to a writable folder", own
        )
