"""The one file that a job is asked to write: whether it can, before the work; the file itself, after it."""

from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.io.storage import check_writable, storage_explained

__all__ = ["check_output_file", "write_output_file"]


def check_output_file(option: str, uri: str) -> None:
    """Try the folder of a file.

    Args:
        option: that names the file, for the message.
        uri: local path or URI.

    Raises:
        JobError: it cannot be written to.
    """
    check_writable(Objects(split_place(uri)[0]), f"{option} {uri}")


def write_output_file(option: str, uri: str, data: bytes) -> None:
    """Write a file whole, or not at all; arguments as for `check_output_file`.

    Raises:
        JobError: it cannot be written.
    """
    folder, name = split_place(uri)
    with storage_explained(f"{option} {uri}"):
        Objects(folder).put(name, data)
        Objects(folder).sweep(deep=False)
