"""Whether what is to be written fits on a local disk."""

import shutil

from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.reporting.units import readable_size

__all__ = ["check_space"]


def check_space(objects: Objects, needed: float, advice: str, *, freed: float = 0) -> None:
    """Check that bytes fit on the disk of a local store; other storages are taken to have room.

    Args:
        objects: the store.
        needed: bytes that are to be written.
        advice: what to do otherwise, for the message.
        freed: bytes that are deleted before.

    Raises:
        JobError: the free space is too small.
    """
    folder = objects.local_path
    if folder is None:
        return
    free = shutil.disk_usage(next(path for path in [folder, *folder.parents] if path.exists())).free + freed
    if needed > free:
        raise JobError(
            f"no space for {objects.uri}: about {readable_size(needed)} needed, {readable_size(free)} free; {advice}"
        )
