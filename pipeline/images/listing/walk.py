"""List local folders and patterns, following links."""

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline.images.listing.findings import Tally
from pipeline.images.listing.names import IMAGE_SUFFIXES, escaped, looks_like_image, suffix_of

__all__ = ["MAGIC", "Entry", "glob_finds", "glob_local", "outermost", "walk_local"]

MAGIC = "*?["
_Identity = tuple[int, int]


class Entry(NamedTuple):
    """A file: its path and its size; the size is None if the file cannot be accessed."""

    path: str
    nbytes: int | None


def walk_local(folder: str, tally: Tally, ancestors: tuple[_Identity, ...] | None = None) -> Iterator[Entry]:
    """Yield every file below a folder, unordered. Links are followed, except to a folder that contains the link.

    A broken or circular link is an entry without a size, so that it is reported as unreadable rather than overlooked.

    Args:
        folder: where to start.
        tally: counts hidden files (a leading ".", such as the "._photo.jpg" in which macOS stores a file's
            attributes), and entries with an image's name that are not files.
        ancestors: the folders that contain this one, if known.

    Raises:
        PermissionError: a folder cannot be listed; the error names it.
    """
    ancestors = _lineage(folder) if ancestors is None else ancestors
    identity = _identity(folder)
    if identity in ancestors:
        tally.add("other", "links to a folder that contains them", escaped(folder))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = _is_folder(entry)
            if entry.name.startswith("."):
                _count_hidden(entry, is_folder, tally)
            elif is_folder:
                yield from walk_local(entry.path, tally, (*ancestors, identity))
            elif file := _file(entry.path, tally):
                yield file


def glob_local(pattern: str, tally: Tally) -> Iterator[Entry]:
    """Yield every file that matches a shell pattern, and every file below matching folders, unordered.

    As in a shell, ``*`` enters linked folders, ``**`` is any number of folders, and a name with a leading "." is
    matched only by a pattern part that begins with one.

    Args:
        pattern: an absolute path with ``*``, ``?``, ``[…]`` or ``**``.
        tally: see `walk_local`.
    """
    first, *parts = pattern.split("/")
    for path in outermost(_matches(first or "/", parts)):
        if os.path.isdir(path):  # noqa: PTH112
            yield from walk_local(path, tally)
        elif file := _file(path, tally):
            yield file


def glob_finds(pattern: str, path: str) -> bool:
    """Whether `glob_local` would yield a file of this path, or files below a folder of this path; it need not exist.

    Args:
        pattern: as for `glob_local`.
        path: absolute.
    """
    return _parts_find(pattern.split("/"), path.split("/"))


def _parts_find(parts: list[str], names: list[str]) -> bool:
    if not parts:  # all below is listed, but what is hidden
        return not any(name.startswith(".") for name in names)
    part, *rest = parts
    if part == "**":
        deeper = bool(names) and not names[0].startswith(".") and _parts_find(parts, names[1:])
        return deeper or _parts_find(rest, names)
    return bool(names) and _matcher(part)(names[0]) and _parts_find(rest, names[1:])


def _matcher(part: str) -> Callable[[str], bool]:
    """Whether a name matches a part of a pattern other than ``**``."""
    if not any(character in part for character in MAGIC):
        return part.__eq__
    matches, hidden = re.compile(fnmatch.translate(part)).match, part.startswith(".")
    return lambda name: name.startswith(".") == hidden and matches(name) is not None


def outermost(paths: Iterable[str]) -> Iterator[str]:
    """Yield, sorted, the paths that are not below another one; those below are found with their folder."""
    last = None
    for path in sorted(paths, key=lambda path: path.replace("/", "\0")):  # a folder's contents follow it directly
        if last is None or not path.startswith(last):
            yield path
            last = path.rstrip("/") + "/"


def _matches(folder: str, parts: list[str], ancestors: tuple[_Identity, ...] = ()) -> Iterator[str]:
    """Yield matching paths below ``folder``. ``ancestors``: the folders that contain it, if reached through ``**``."""
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == "**":
        ancestors = ancestors or _lineage(folder)
        identity = _identity(folder)
        if identity not in ancestors:
            yield from _matches(folder, rest)
            for name in _folders(folder, lambda name: not name.startswith(".")):
                yield from _matches(_join(folder, name), parts, (*ancestors, identity))
        return
    if any(character in part for character in MAGIC):
        wanted = _matcher(part)
        names = _folders(folder, wanted) if rest else filter(wanted, os.listdir(folder))  # noqa: PTH208
        for name in names:
            yield from _matches(_join(folder, name), rest)
        return
    path = _join(folder, part)
    if os.path.isdir(path) if rest else os.path.lexists(path):  # noqa: PTH112
        yield from _matches(path, rest)


def _identity(folder: str) -> _Identity:
    status = os.stat(folder)  # noqa: PTH116 - paths stay strings: there can be millions
    return status.st_dev, status.st_ino


def _lineage(folder: str) -> tuple[_Identity, ...]:
    """The folders that contain a folder."""
    names = folder.split("/")[1:-1]
    return tuple(_identity("/" + "/".join(names[:end])) for end in range(len(names) + 1)) if names else ()


def _folders(folder: str, wanted: Callable[[str], bool]) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if wanted(entry.name) and _is_folder(entry)]


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one into a folder without permission: reported when it is read
        return False


def _file(path: str, tally: Tally) -> Entry | None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return Entry(path, None)
    if stat.S_ISREG(status.st_mode):
        return Entry(path, status.st_size)
    if suffix_of(path) in IMAGE_SUFFIXES:
        tally.add("image", "entries with an image's name that are not files (a pipe, a device)", escaped(path))
    return None


def _count_hidden(entry: os.DirEntry[str], is_folder: bool, tally: Tally) -> None:
    if is_folder:
        tally.add("other", "hidden folders, not entered", escaped(entry.path))
    elif suffix_of(entry.name) in IMAGE_SUFFIXES or looks_like_image(entry.name):
        tally.add("other", "hidden files with an image's name", escaped(entry.path))
