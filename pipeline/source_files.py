"""The files behind a path, a pattern or a URL, and scanning them in order."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from densefeat.places import open_place
from pipeline.errors import JobError
from pipeline.storage_errors import explain_storage_error
from schemas.index import REFERENCES

__all__ = [
    "File",
    "Found",
    "explained",
    "find_files",
    "scan_in_order",
    "suffix_of",
    "uri_of",
]

_PARALLEL_SCANS = 8
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# Whose exceptions derive from neither OSError nor ValueError.
_STORAGE_PACKAGES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google")


class File(NamedTuple):
    """One file of a dataset: its path in the filesystem, the same relative to the dataset's root, its size if known."""

    path: str
    relative: str
    nbytes: int | None


class Found(NamedTuple):
    """The visible files behind one path or pattern, in the order asked for, and the filesystem that has them."""

    filesystem: AbstractFileSystem
    files: list[File]


def uri_of(filesystem: AbstractFileSystem, path: str) -> str:
    """Return the absolute URI of a path: plain if local, with its protocol otherwise."""
    return path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))


def suffix_of(path: str) -> str:
    """Return the last suffix in lower case, with its dot; ``.tar.gz`` and its like count as one."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes[-2:]]
    return "".join(suffixes) if suffixes[:1] == [".tar"] else "".join(suffixes[-1:])


@contextmanager
def explained(images: str) -> Iterator[None]:
    """Turn what storage raises while a dataset is listed into a JobError that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        missing = error.filename or (error.args[-1] if error.args else images)
        raise JobError(
            f"Images {images!r}: {missing} does not exist. Check the spelling; for a brace pattern, every file it "
            "spells out must be there."
        ) from error
    except Exception as error:
        known = explain_storage_error(error, f"Images {images!r}", "read")
        if known is not None:
            raise known from error
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError | ValueError) and package not in _STORAGE_PACKAGES:
            raise
        raise JobError(
            f"Images {images!r}: could not be listed: {type(error).__name__}: {error}. Expected a local path, or an "
            "s3://, gs:// or http(s):// URI that answers."
        ) from error


def find_files(images: str, *, suffixes: frozenset[str], storage_options: Mapping[str, Any] | None = None) -> Found:
    """List the files behind a folder, a file, a glob, or a pattern with ``{000..099}`` or ``{a,b}``.

    A name that exists as it is written is never read as a pattern. Hidden files and folders (a leading ``.``) below
    the root are left out. Links are followed; one that leads back to a folder it lies in is not.

    Args:
        images: what to list.
        suffixes: what names a file rather than a folder; decides over http, where both look alike.
        storage_options: for the filesystem.

    Returns:
        Folders and globs sorted by path (code points); the alternatives of braces in the order written.

    Raises:
        OSError: as the storage raises it; FileNotFoundError names what a brace pattern spells out but is missing.
    """
    filesystem, path = open_place(images, storage_options)
    path = path.rstrip("/") or path
    magic = "*" if path.startswith("http") else "*?["  # "?" begins the query of a URL
    if not any(character in path for character in magic + "{") or filesystem.exists(path):
        return Found(filesystem, _list(filesystem, path, None, suffixes))
    root = _fixed_part(path, magic + "{")
    found: list[File] = []
    for alternative in _expand_braces(path):
        if any(character in alternative for character in magic):
            infos = filesystem.glob(alternative, detail=True).values()
            found += _files_of((info for info in infos if info["type"] != "directory"), root)
        else:
            found += _list(filesystem, alternative, root, suffixes)
    return Found(filesystem, found)


def scan_in_order(scan: Callable[[str, int | None], pa.Table], paths: Sequence[str], limit: int | None) -> pa.Table:
    """Run ``scan(path, limit)`` for every path, several at once, and join the tables in the order of ``paths``.

    With a ``limit`` the paths are taken one after the other, and none beyond what fills it.
    """
    if limit is None:
        with ThreadPoolExecutor(_PARALLEL_SCANS) as pool:
            return pa.concat_tables([REFERENCES.empty_table(), *pool.map(scan, paths, itertools.repeat(None))])
    tables = [REFERENCES.empty_table()]
    for path in paths:
        missing = limit - sum(table.num_rows for table in tables)
        if missing <= 0:
            break
        tables.append(scan(path, missing).slice(0, missing))
    return pa.concat_tables(tables)


def _expand_braces(pattern: str) -> list[str]:
    """``{000..099}`` (zeros kept) and ``{a,b}``, any number of them, the last one varying fastest."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    choices = match[1].split(",")
    if bounds := _RANGE.fullmatch(match[1]):
        first, last = bounds.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    heads = [pattern[: match.start()] + choice for choice in choices]
    tails = _expand_braces(pattern[match.end() :])
    return [head + tail for head in heads for tail in tails]


def _fixed_part(path: str, magic: str) -> str:
    parts = path.split("/")
    fixed = itertools.takewhile(lambda part: not any(character in part for character in magic), parts)
    return "/".join(fixed)


def _list(filesystem: AbstractFileSystem, path: str, root: str | None, suffixes: frozenset[str]) -> list[File]:
    """Everything below a folder, or the one file; relative to ``root``, else to the folder or the file's parent."""
    info = filesystem.info(path)
    is_folder = info["type"] == "directory"
    if path.startswith("http"):  # every URL claims to be a file
        is_folder = suffix_of(path) not in suffixes
    if not is_folder:
        return [_file_of(info, path.rpartition("/")[0] if root is None else root)]
    if isinstance(filesystem, LocalFileSystem):
        infos = _walk_local(path, ())
    else:
        infos = iter(filesystem.find(path, detail=True).values())
    return _files_of(infos, path if root is None else root)


def _file_of(info: Mapping[str, Any], root: str) -> File:
    path = info["name"]
    return File(path, path.removeprefix(root).lstrip("/"), info.get("size"))


def _files_of(infos: Iterable[Mapping[str, Any]], root: str) -> list[File]:
    files = (_file_of(info, root) for info in infos)
    # A leading "." is also how macOS names the "._photo.jpg" that hold a file's attributes.
    visible = (file for file in files if not any(part.startswith(".") for part in file.relative.split("/")))
    return sorted(visible, key=lambda file: file.relative)


def _walk_local(folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    """Not fsspec's find: that does not enter linked folders."""
    status = os.stat(folder)  # noqa: PTH116 - paths stay strings: there can be millions
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _walk_local(entry.path, (*ancestors, identity))
            elif entry.is_file():
                yield {"name": entry.path, "size": entry.stat().st_size}
            elif entry.is_symlink():  # broken: listed, so that it is reported as unreadable and not overlooked
                yield {"name": entry.path, "size": None}
