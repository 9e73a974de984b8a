"""Find the files of a path, a pattern or a URL, and scan them in order."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from densefeat.errors import DensefeatError
from densefeat.storage.places import absolute_place, is_local, open_place, place_identity
from densefeat.storage.retries import retried
from pipeline.errors import JobError
from pipeline.images.listing.findings import Finding, Tally
from pipeline.images.listing.labels import Labels
from pipeline.images.listing.names import IMAGE_SUFFIXES, escaped, looks_like_image, suffix_of
from pipeline.images.listing.walk import MAGIC, Entry, glob_finds, glob_local, outermost, walk_local
from pipeline.io.errors import explain_storage_error

__all__ = ["File", "Found", "Scan", "ScanMap", "explained", "find_files", "pattern_finds", "scan_in_order", "uri_of"]

_PARALLEL_SCANS = 8
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# Packages whose exceptions derive from neither OSError nor ValueError.
_STORAGE_PACKAGES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google")


class File(NamedTuple):
    """One file of a dataset: path in the filesystem, path relative to the dataset's root, and size if known."""

    path: str
    relative: str
    nbytes: int | None


class Found(NamedTuple):
    """The visible files of one path or pattern, in the requested order, and their filesystem."""

    filesystem: AbstractFileSystem
    files: list[File]

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine."""
        return isinstance(self.filesystem, LocalFileSystem)


class Scan(NamedTuple):
    """The contents of one tar or Parquet file.

    Attributes:
        references: ``schemas.index.REFERENCES``; ``label`` is null, because it depends on all files.
        labels: of the rows, as stored in the file.
        findings: what was not used.
        candidates: number of images found, including those beyond a limit.
    """

    references: pa.Table
    labels: Labels
    findings: tuple[Finding, ...]
    candidates: int


# Runs a picklable function on every path, and returns the results in the order of the paths.
ScanMap = Callable[[Callable[[str], Scan], Sequence[str]], Iterable[Scan]]


def uri_of(filesystem: AbstractFileSystem, path: str) -> str:
    """Return the absolute URI of a path: the `escaped` path if local, otherwise with its protocol."""
    if isinstance(filesystem, LocalFileSystem):
        return escaped(path)
    return str(filesystem.unstrip_protocol(path))


@contextmanager
def explained(images: str) -> Iterator[None]:
    """Turn storage errors during a listing into a ``JobError`` that says what to do."""
    try:
        yield
    except DensefeatError as error:
        # MissingPackage names the extra; on a cluster it is to be installed on every node.
        known = explain_storage_error(error, f"Images {images!r}", "read")
        if known is None:
            raise
        raise known from error
    except FileNotFoundError as error:
        missing = error.filename or (error.args[-1] if error.args else images)
        raise JobError(
            f"Images {images!r}: {missing} does not exist. Check the spelling; for a brace pattern, every file it "
            "expands to must exist."
        ) from error
    except Exception as error:
        known = explain_storage_error(error, f"Images {images!r}", "read")
        if known is not None:
            raise known from error
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError | ValueError) and package not in _STORAGE_PACKAGES:
            raise
        raise JobError(
            f"Images {images!r}: could not be listed: {type(error).__name__}: {error}. Expected a local path, or a "
            "reachable s3://, gs:// or http(s):// URI."
        ) from error


def find_files(
    images: str, *, suffixes: frozenset[str], tally: Tally, storage_options: Mapping[str, Any] | None = None
) -> Found:
    """List the files of a folder, a file, a glob, or a pattern with ``{000..099}`` or ``{a,b}``.

    A name that exists literally is never treated as a pattern. A folder that matches a pattern is listed like one named
    directly: recursively, following links, without hidden files and folders (a leading ``.``).

    Args:
        images: what to list.
        suffixes: suffixes of files; over http they distinguish files from folders.
        tally: counts what is left out.
        storage_options: for the filesystem.

    Returns:
        Each path once: folders and globs sorted by path (code points), brace alternatives in the order written.

    Raises:
        OSError: from the storage; FileNotFoundError names the missing file of a brace pattern.
    """
    filesystem, path = open_place(images, storage_options)
    path = path.rstrip("/") or path
    magic = "*" if path.startswith("http") else MAGIC  # "?" begins the query of a URL
    if not _has_any(path, magic + "{") or retried(lambda: filesystem.exists(path), images):
        root, alternatives = None, [path]
        magic = ""
    else:
        root, alternatives = _fixed_part(path, magic + "{"), _expand_braces(path)
    files: dict[str, File] = {}
    for alternative in alternatives:
        pattern = alternative if _has_any(alternative, magic) else None
        found, found_tally = retried(partial(_find, filesystem, alternative, pattern, root, suffixes), images)
        for file in sorted(found, key=lambda file: file.relative):
            if files.setdefault(file.path, file) is not file:
                tally.add("other", "files that the pattern names more than once, used once", escaped(file.relative))
        for finding in found_tally.findings():
            tally.add(finding.about, finding.reason, finding.example, finding.count)
    return Found(filesystem, list(files.values()))


def pattern_finds(images: str, *places: str) -> bool:
    """Whether ``images`` is a pattern, a listing of which would find one of ``places``, or files in it.

    Links are followed on the way to the first wildcard, and on the way to a place.

    Args:
        images: as for `find_files`.
        places: paths or URIs of files or folders that need not exist.
    """
    pattern = absolute_place(images)
    # Not pathlib, which raises for a pattern that is too long for a name.
    if not _has_any(pattern, MAGIC + "{") or (is_local(pattern) and os.path.exists(pattern)):  # noqa: PTH110
        return False
    return any(
        glob_finds(alternative, path)
        for spelled in (absolute_place, place_identity)
        for alternative in _expand_braces(spelled(images))
        for path in map(spelled, places)
    )


def scan_in_order(
    scan: Callable[[str, int | None], Scan], paths: Sequence[str], limit: int | None, scan_map: ScanMap | None
) -> list[Scan]:
    """Run ``scan(path, limit)`` for every path in parallel; results are in the order of ``paths``.

    With a ``limit``, paths are scanned one by one until it is reached.

    Args:
        scan: picklable.
        paths: of the files.
        limit: maximum number of rows.
        scan_map: runs the scans; None: threads of this process.
    """
    if limit is None:
        if scan_map is not None and len(paths) > 1:
            return list(scan_map(partial(_unlimited, scan), paths))
        with ThreadPoolExecutor(_PARALLEL_SCANS) as pool:
            return list(pool.map(partial(_unlimited, scan), paths))
    scans: list[Scan] = []
    missing = limit
    for path in paths:
        if missing <= 0:
            break
        scans.append(scan(path, missing))
        missing -= scans[-1].references.num_rows
    return scans


def _unlimited(scan: Callable[[str, int | None], Scan], path: str) -> Scan:
    return scan(path, None)


def _expand_braces(pattern: str) -> list[str]:
    """Expand any number of ``{000..099}`` (zeros kept) and ``{a,b}``; the last one varies fastest."""
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


def _has_any(path: str, characters: str) -> bool:
    return any(character in path for character in characters)


def _fixed_part(path: str, magic: str) -> str:
    return "/".join(itertools.takewhile(lambda part: not _has_any(part, magic), path.split("/")))


def _find(
    filesystem: AbstractFileSystem, path: str, pattern: str | None, root: str | None, suffixes: frozenset[str]
) -> tuple[list[File], Tally]:
    """Files of one path or pattern, relative to ``root``: by default the folder, or the file's parent."""
    tally = Tally()
    local = isinstance(filesystem, LocalFileSystem)
    if pattern is not None:
        entries = glob_local(pattern, tally) if local else _glob_remote(filesystem, pattern, root or "", tally)
    elif not _is_folder(filesystem, path, suffixes):
        root = path.rpartition("/")[0] if root is None else root
        entries = iter([Entry(path, filesystem.info(path).get("size"))])
    elif local:
        entries = walk_local(path, tally)
    else:
        entries = _visible(filesystem.find(path, detail=True), path, tally)
    start = path if root is None else root
    return [File(entry.path, entry.path.removeprefix(start).lstrip("/"), entry.nbytes) for entry in entries], tally


def _is_folder(filesystem: AbstractFileSystem, path: str, suffixes: frozenset[str]) -> bool:
    if path.startswith("http"):  # over http every URL is reported as a file
        filesystem.info(path)
        return suffix_of(path) not in suffixes
    return bool(filesystem.info(path)["type"] == "directory")


def _glob_remote(filesystem: AbstractFileSystem, pattern: str, root: str, tally: Tally) -> Iterator[Entry]:
    """Like ``glob_local``; in remote storages, folders are key prefixes."""
    infos = filesystem.glob(pattern, detail=True)
    paths = [entry.path for entry in _visible(infos, None if "/." in pattern.removeprefix(root) else root, tally)]
    by_name = {info["name"]: info for info in infos.values()}
    for path in outermost(paths):
        if by_name[path]["type"] == "directory":
            yield from _visible(filesystem.find(path, detail=True), path, tally)
        else:
            yield Entry(path, by_name[path].get("size"))


def _visible(infos: Mapping[str, Mapping[str, Any]], root: str | None, tally: Tally) -> Iterator[Entry]:
    """Yield the paths without a leading "." in any part after ``root``; all paths if ``root`` is None."""
    for info in infos.values():
        path = info["name"]
        if root is None or not any(part.startswith(".") for part in path.removeprefix(root).split("/")):
            yield Entry(path, info.get("size"))
        elif suffix_of(path) in IMAGE_SUFFIXES or looks_like_image(path):
            tally.add("other", "hidden files with an image's name", path)
