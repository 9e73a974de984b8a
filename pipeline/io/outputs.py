"""Output files of a job: checked before the work, written after it."""

from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.io.storage import check_writable, storage_explained

__all__ = ["check_output_file", "write_output_file"]


def check_output_file(option: str, uri: str) -> None:
    """Check that the folder of an output file can be written to.

    Args:
        option: the option that names the file, for the message.
        uri: local path or URI of the file.

    Raises:
        JobError: the folder cannot be written to.
        StorageUnavailable: the storage does not answer.
    """
    check_writable(Objects(split_place(uri)[0]), f"{option} {uri}")


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
