"""From a text that names a place (a path, ``s3://…``, ``zip://…::…``) to its file system and the path there.

The only such function: images, stores, weights, bases and outputs all go through it, so that a text means the same
place to whoever reads, writes, compares or deletes what lies there.
"""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.implementations.local import LocalFileSystem

__all__ = ["absolute_place", "is_local", "open_place", "open_uri", "split_place"]

_LOCAL_PROTOCOLS = ("file", "local")
# In a URL a second slash can mean something, and nothing is ever written there.
_SLASHES_KEPT = ("http", "https")
# Constructor arguments of file systems that lie in another one (archives, caches): only these make a chain.
_WRAPPING_ARGUMENTS = frozenset({"fo", "fs", "target_protocol"})


def absolute_place(place: str | os.PathLike[str]) -> str:
    """The same text for the same place, whatever the working directory.

    Args:
        place: a local path, ``file://…``, or a URI of any file system that fsspec knows.

    Returns:
        A local path is absolute, without ``~``, ``..`` and ``file://``; a URI has single slashes and none at its end
        (``http(s)`` keeps them as they are, but for the last).
    """
    text = os.fspath(place)
    protocol, separator, rest = text.partition("://")
    if is_local(text):
        local = LocalFileSystem._strip_protocol(text) if separator else text
        return os.path.abspath(Path(local).expanduser())  # noqa: PTH100 - Path.absolute keeps "..", resolve follows links
    if _is_chain(text):
        return text
    if protocol not in _SLASHES_KEPT:
        rest = re.sub("/{2,}", "/", rest)
    return f"{protocol}://{rest.rstrip('/')}"


def is_local(place: str) -> bool:
    """Whether the text names a path on this machine, ``file://`` included. A name may hold ``::``."""
    protocol, separator, _ = place.partition("://")
    return not separator or protocol in _LOCAL_PROTOCOLS


def open_place(
    place: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[AbstractFileSystem, str]:
    """The file system of a place that a person named, and the path as that file system writes it.

    ``::`` makes a chain (``zip://photos/*.jpg::s3://bucket/photos.zip``) only behind a file system that lies in
    another one and is written with ``://``; anywhere else it is a part of a name.

    Args:
        place: as for `absolute_place`.
        storage_options: keyword arguments for a remote file system, as fsspec takes them.

    Raises:
        ImportError: the package behind the protocol is not installed.
        ValueError: the protocol is unknown.
    """
    return open_uri(absolute_place(place), storage_options)


def open_uri(uri: str, storage_options: Mapping[str, Any] | None = None) -> tuple[AbstractFileSystem, str]:
    """As `open_place`, for the URI of one object as a listing or a table has it: its slashes are part of its name."""
    if is_local(uri):
        return LocalFileSystem(), absolute_place(uri)
    options = dict(storage_options or {})
    if _is_chain(uri):
        filesystem, path = fsspec.core.url_to_fs(uri, **options)
        return filesystem, path
    cls = get_filesystem_class(uri.partition("://")[0])
    return cls(**{**cls._get_kwargs_from_urls(uri), **options}), cls._strip_protocol(uri)


def split_place(place: str | os.PathLike[str]) -> tuple[str, str]:
    """Folder and name of a place, e.g. for ``Objects(folder).get(name)``."""
    folder, _, name = absolute_place(place).rpartition("/")
    return folder or "/", name


def _is_chain(text: str) -> bool:
    first, separator, _ = text.partition("::")
    protocol, has_protocol, _ = first.partition("://")
    if not separator or not has_protocol or protocol in _LOCAL_PROTOCOLS:
        return False
    arguments = inspect.signature(get_filesystem_class(protocol).__init__).parameters
    return not _WRAPPING_ARGUMENTS.isdisjoint(arguments)
