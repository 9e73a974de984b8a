"""Whether what is to be written fits on a local disk."""

import shutil
from collections.abc import Collection

from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.reporting.units import readable_size
from schemas.ledger import LedgerRecord

__all__ = ["check_space", "check_space_for_rest"]


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


def check_space_for_rest(objects: Objects, done: Collection[LedgerRecord], rows: int, advice: str) -> None:
    """Check that the missing rows of a begun store fit on a local disk, if they are as large as those that are done.

    Args:
        objects: the store.
        done: records of its finished shards; without any, there is nothing to judge by.
        rows: number of missing rows.
        advice: as for `check_space`.

    Raises:
        JobError: the free space is too small.
    """
    if done:
        row_nbytes = sum(record.total_nbytes for record in done) / sum(record.rows for record in done)
        check_space(objects, row_nbytes * rows, advice)
