"""Output files of a job: checked before the work, written after it."""

from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.errors import JobError
from pipeline.io.storage import check_writable, storage_explained

__all__ = ["check_output_file", "write_output_file"]


def check_output_file(option: str, uri: str) -> None:
    """Check that an output file can be written.

    Args:
        option: the option that names the file, for the message.
        uri: local path or URI of the file.

    Raises:
        JobError: the folder cannot be written to, or the name is that of a folder, or too long.
        StorageUnavailable: the storage does not answer.
    """
    place, (folder, name) = f"{option} {uri}", split_place(uri)
    objects = Objects(folder)
    if (local := objects.local_path) is not None:
        if (local / name).is_dir():
            raise JobError(f"{place} is a folder: expected the name of a file")
        with storage_explained(place):
            objects.exists(f".{name}.{'0' * 32}.partial")  # what it is called while it is written
    check_writable(objects, place)


def write_output_file(option: str, uri: str, data: bytes) -> None:
    """Write a file atomically.

    Args:
        option: the option that names the file, for the message.
        uri: local path or URI of the file.
        data: content of the file.

    Raises:
        JobError: the file cannot be written.
        StorageUnavailable: the storage does not answer.
    """
    folder, name = split_place(uri)
    with storage_explained(f"{option} {uri}"):
        Objects(folder).put(name, data)
        Objects(folder).sweep(deep=False)
