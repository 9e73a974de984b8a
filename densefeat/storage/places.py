"""Resolve a path or URI (``s3://…``, ``zip://…::…``) to its file system and the path in it.

Images, stores, weights, bases and outputs are all resolved here, so that a text means the same location for every
reader, writer, comparison and deletion. A probable typo (an empty text, ``s3:/bucket``) is refused rather than treated
as the name of a folder.
"""

import inspect
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import fsspec
from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.implementations.local import LocalFileSystem

from densefeat.errors import PlaceError, missing_package

__all__ = [
    "absolute_place",
    "encloses",
    "is_local",
    "open_place",
    "open_uri",
    "overlap",
    "place_identity",
    "split_place",
]

_LOCAL_PROTOCOLS = ("file", "local")
# The first part of a path is a bucket: nothing can be written above it, and no path begins with a slash.
_BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "tos")
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}  # aliases of the same file system
# The package that each protocol requires, and densefeat's extra that has it.
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "http": ("aiohttp", "http"), "https": ("aiohttp", "http")}
# Double slashes in a URL can be significant, and nothing is ever written there.
_SLASHES_KEPT = ("http", "https")
# Arguments by protocol, unless others are given. With ten connections, the default of botocore, requests of 150 ms are
# at most 67 per second.
_ARGUMENTS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"max_pool_connections": 128}}}
# Constructor arguments of file systems inside another one (archives, caches); only these allow a chain.
_WRAPPING_ARGUMENTS = frozenset({"fo", "fs", "target_protocol"})
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)")


def absolute_place(place: str | os.PathLike[str]) -> str:
    """Normalize a path or URI, independent of the working directory.

    Args:
        place: a local path, ``file://…``, or a URI of any file system that fsspec supports.

    Returns:
        A local path is absolute, without ``~``, ``..``, double slashes and ``file://``. A URI has a lower-case
        protocol, single slashes, no trailing slash, no ``.`` and no ``..`` (``http(s)`` loses only trailing slashes).
        Nothing is decoded: ``%``, ``#``, ``?`` and spaces are parts of names.

    Raises:
        PlaceError: ``place`` is not a valid path or URI.
    """
    text = _checked(place)
    if is_local(text):
        return _local_path(text)
    protocol, rest = _split_uri(text)
    if _is_chain(text):
        return _absolute_chain(text)
    if protocol in _SLASHES_KEPT:
        return f"{protocol}://{rest.rstrip('/')}"
    # hdfs:///path omits the host; s3:///bucket has one slash too many.
    root = "/" if rest.startswith("/") and protocol not in (*_BUCKET_PROTOCOLS, "memory") else ""
    parts = _parts(rest, text, kept=int(not root))
    if not parts and protocol in _BUCKET_PROTOCOLS:
        raise PlaceError(f"{text!r} names no bucket: expected {protocol}://bucket/…")
    return f"{protocol}://{root}{'/'.join(parts)}"


def is_local(place: str | os.PathLike[str]) -> bool:
    """Whether ``place`` is a path on this machine, including ``file://``. Names may contain ``::`` and ``://``."""
    match = _URI.match(os.fspath(place))
    return match is None or match[1].lower() in _LOCAL_PROTOCOLS


def open_place(
    place: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[AbstractFileSystem, str]:
    """Open the file system of a path or URI given by a user; return it and the path in its own notation.

    ``::`` forms a chain (``zip://photos/*.jpg::s3://bucket/photos.zip``) only after a file system that is inside
    another one and is written with ``://``; anywhere else it is part of a name.

    Args:
        place: as for `absolute_place`.
        storage_options: keyword arguments for a remote file system, passed to fsspec.

    Raises:
        MissingPackage: the package for the protocol is not installed, and is in one of densefeat's extras.
        ImportError: another package for the protocol is not installed.
        PlaceError: ``place`` is not a valid path or URI, or its protocol is unknown.
    """
    return open_uri(absolute_place(place), storage_options)


def open_uri(uri: str, storage_options: Mapping[str, Any] | None = None) -> tuple[AbstractFileSystem, str]:
    """Like `open_place`, for the exact URI of an object from a listing or a table: its slashes are part of its name."""
    if is_local(uri):
        return LocalFileSystem(), _local_path(_checked(uri))
    options = dict(storage_options or {})
    if _is_chain(uri):
        filesystem, path = fsspec.core.url_to_fs(uri, **options)
        return filesystem, path
    cls = _filesystem_class(uri)
    try:
        filesystem = cls(**{**_default_arguments(uri), **cls._get_kwargs_from_urls(uri), **options})
    except TypeError as error:  # e.g. zip://photos.zip: the file system that contains it is not named
        raise PlaceError(f"{uri!r} cannot be opened: {error}") from error
    protocol, rest = _split_uri(uri)
    return filesystem, cls._strip_protocol(f"{protocol}://{rest}")


def _default_arguments(uri: str) -> dict[str, Any]:
    protocol = _split_uri(uri)[0]
    name = _OTHER_NAMES.get(protocol, protocol)
    return {
        key: value for key, value in _ARGUMENTS.get(name, {}).items() if key not in fsspec.config.conf.get(name, {})
    }


def split_place(place: str | os.PathLike[str]) -> tuple[str, str]:
    """Split a path or URI into folder and file name, e.g. for ``Objects(folder).get(name)``.

    Raises:
        PlaceError: ``place`` has no folder, because it is the root or a bucket.
    """
    text = absolute_place(place)
    if is_local(text):
        folder, name = os.path.split(text)
    else:
        link, separator, rest = text.partition("::") if _is_chain(text) else (text, "", "")
        protocol, path = _split_uri(link)
        folder, slash, name = path.rpartition("/")
        if not slash and protocol in (*_BUCKET_PROTOCOLS, *_SLASHES_KEPT):
            name = ""
        folder = f"{protocol}://{folder}{separator}{rest}"
    if not name:
        raise PlaceError(f"{os.fspath(place)!r} names no file: expected a file in a folder or bucket")
    return folder, name


def encloses(outer: str | os.PathLike[str], inner: str | os.PathLike[str]) -> bool:
    """Whether ``inner`` is ``outer`` or below it; symbolic links are followed."""
    top, place = place_identity(outer), place_identity(inner)
    return place == top or place.startswith(f"{top.rstrip('/')}/")


def overlap(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two places are the same, or one is below the other."""
    return encloses(one, other) or encloses(other, one)


def place_identity(place: str | os.PathLike[str]) -> str:
    """Like `absolute_place`, and the same for all names of a place: links are followed, ``s3a`` is ``s3``."""
    text = absolute_place(place)
    if is_local(text):
        return os.path.realpath(text)
    protocol, rest = _split_uri(text)
    return f"{_OTHER_NAMES.get(protocol, protocol)}://{rest}"


def _checked(place: str | os.PathLike[str]) -> str:
    """Return ``place`` as text, unless it looks like a typo."""
    text = os.fspath(place)
    if not isinstance(text, str):
        raise TypeError(f"expected a path or URI as str or pathlib.Path: got {place!r}")
    if not text.strip():
        raise PlaceError(f"{text!r} is not a path or URI: expected a path, or a URI such as s3://bucket/folder")
    if "\0" in text:
        raise PlaceError(f"{text!r} is not a path or URI: it contains a null character")
    if not _URI.match(text) and _URI.match(text.strip()):
        raise PlaceError(f"{text!r} begins with whitespace: remove it, or put ./ in front if it is a file name")
    slip = _ONE_SLASH.match(text)
    if slip and slip[1].lower() not in _LOCAL_PROTOCOLS and slip[1].lower() in fsspec.available_protocols():
        uri = f"{slip[1]}://{text[slip.end() :]}"
        raise PlaceError(
            f"{text!r} has one slash where a URI has two: write {uri} (as a str: pathlib.Path drops a slash), or "
            f"./{text} if that is a folder name"
        )
    return text


def _split_uri(text: str) -> tuple[str, str]:
    """Split a URI into its protocol in lower case, and the part after ``://``."""
    match = _URI.match(text)
    assert match is not None
    return match[1].lower(), match[2]


def _local_path(text: str) -> str:
    match = _URI.match(text)
    path = text
    if match:
        path = match[2]
        if path == "localhost" or path.startswith("localhost/"):  # file URIs may name this machine
            path = path.removeprefix("localhost") or "/"
        if not path:
            raise PlaceError(f"{text!r} has no path: expected file:///…")
    elif text[:6].lower() == "file:/":
        path = text[5:]
    path = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - pathlib keeps ".." and refuses "~nobody"
    # In POSIX the meaning of two leading slashes is undefined; here they mean one, so that paths compare equal.
    return f"/{path.lstrip('/')}" if path.startswith("//") else path


def _parts(rest: str, text: str, *, kept: int) -> list[str]:
    """The parts of a URI's path; ``..`` cannot remove the first ``kept`` of them."""
    parts: list[str] = []
    for part in rest.split("/"):
        if part == "..":
            if len(parts) <= kept:
                raise PlaceError(f"{text!r} is not a valid URI: its '..' leads above the root or bucket")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _absolute_chain(text: str) -> str:
    """Normalize a chain, so that the file it is in is found from any working directory."""
    first, *links = text.split("::")
    if not links[-1]:
        raise PlaceError(f"{text!r} is incomplete: expected a path or a URI after the last '::'")
    protocol, rest = _split_uri(first)
    inner = re.sub("/{2,}", "/", rest).rstrip("/")
    return "::".join([f"{protocol}://{inner}", *links[:-1], absolute_place(links[-1])])


def _filesystem_class(text: str) -> type[AbstractFileSystem]:
    protocol, _ = _split_uri(text)
    try:
        cls: type[AbstractFileSystem] = get_filesystem_class(protocol)
        return cls
    except ValueError as error:
        raise PlaceError(
            f"{text!r} has the unknown protocol {protocol}://: expected a path, s3://, gs://, http(s):// or another "
            "fsspec protocol; put ./ in front if it is a file name"
        ) from error
    except ImportError as error:
        package, extra = _PACKAGES.get(_OTHER_NAMES.get(protocol, protocol), ("", ""))
        if not package or find_spec(package) is not None:  # another package, or a broken one
            raise
        raise missing_package(f"{protocol}:// ({text!r})", package, extra) from error


def _is_chain(text: str) -> bool:
    first, separator, _ = text.partition("::")
    if not separator or is_local(first):
        return False
    arguments = inspect.signature(_filesystem_class(first).__init__).parameters
    return not _WRAPPING_ARGUMENTS.isdisjoint(arguments)
