"""WebDataset tars as references: every image's byte range, found by reading the headers once."""

import contextlib
import logging
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.errors import JobError
from pipeline.source_files import uri_of
from schemas.index import REFERENCES

__all__ = ["scan_tar"]

_logger = logging.getLogger(__name__)

_READ_AHEAD_BYTES = 4 << 20
_BLOCK_BYTES = 512
_LABEL_BYTES = 32  # a 64-bit integer in ASCII, and white space
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class _Sample:
    """Consecutive members that share a key."""

    key: str
    images: list[tuple[str, int, int]] = field(default_factory=list)  # extension, offset, nbytes
    label: int | None = None


def scan_tar(
    filesystem: AbstractFileSystem,
    path: str,
    limit: int | None,
    *,
    image_suffixes: tuple[str, ...],
    image_extension: str | None = None,
) -> pa.Table:
    """List the images in one tar, grouped as WebDataset does: by the member's path up to the basename's first dot.

    The tar is read through once with read-ahead: members are small, so skipping them would save nothing and cost a
    request each. Of a sample with several images, the one is taken whose extension is one suffix and comes first in
    ``image_suffixes`` (``jpg`` before ``png`` before ``seg.png``), unless ``image_extension`` says which.

    Args:
        filesystem: where the tar is.
        path: its path there.
        limit: stop after this many images; the rest of the tar is then not checked.
        image_suffixes: lower case, with the dot, in order of preference.
        image_extension: everything after the basename's first dot, e.g. ``jpg`` or ``left.png``.

    Returns:
        ``REFERENCES``, in the order of the members. ``label`` is from ``.cls`` members (ASCII integers).

    Raises:
        JobError: the tar is compressed, truncated or damaged; it names the file and the byte.
    """
    uri = uri_of(filesystem, path)
    with filesystem.open(path, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead") as file:
        _refuse_compressed(file.read(6), uri)
        file.seek(0)
        samples = _Grouping(uri, image_suffixes, image_extension)
        _scan_members(file, samples, limit)
    return samples.table()


class _Grouping:
    """Members in, rows out."""

    def __init__(self, uri: str, image_suffixes: tuple[str, ...], image_extension: str | None) -> None:
        self.uri = uri
        self._suffixes = image_suffixes
        self._extension = image_extension.lower() if image_extension else None
        self._rows: list[tuple[str, int, int, int | None]] = []
        self._sample: _Sample | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        _, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not member.isfile() or not stem or not dot:  # no key: not part of a sample, e.g. README or ._photo.jpg
            return
        key = member.name[: len(member.name) - len(name) + len(stem)]
        if self._sample is None or self._sample.key != key:
            self.finish()
            self._sample = _Sample(key)
        extension = extension.lower()
        if extension == "cls":
            self._sample.label = self._label(tar, member)
        elif self._is_image(extension):
            self._sample.images.append((extension, member.offset_data, member.size))

    def finish(self) -> None:
        sample, self._sample = self._sample, None
        if sample is not None and sample.images:
            _, offset, nbytes = min(sample.images, key=self._preference)  # the first of equals
            self._rows.append((sample.key, offset, nbytes, sample.label))

    def table(self) -> pa.Table:
        keys, offsets, sizes, labels = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
        return pa.table([keys, [self.uri] * len(keys), offsets, sizes, labels], schema=REFERENCES)

    def _is_image(self, extension: str) -> bool:
        if self._extension is not None:
            return extension == self._extension
        return PurePosixPath("x." + extension).suffix in self._suffixes

    def _preference(self, image: tuple[str, int, int]) -> int:
        suffix = "." + image[0]
        return self._suffixes.index(suffix) if suffix in self._suffixes else len(self._suffixes)

    def _label(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
        data = tar.extractfile(member)
        text = data.read(_LABEL_BYTES) if data is not None else b""
        with contextlib.suppress(ValueError):
            return int(text)
        _logger.warning("%s: member %s holds %r, not an integer; its image gets no label.", self.uri, member.name, text)
        return None


def _scan_members(file: Any, samples: _Grouping, limit: int | None) -> None:
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                position = member.offset
                samples.add(tar, member)
                if limit is not None and len(samples) >= limit:
                    return
            samples.finish()
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _broken(samples.uri, position, str(error)) from error
    # tarfile takes a header that is cut off or damaged for the end; the end is a block of zeros.
    file.seek(position)
    block = file.read(_BLOCK_BYTES)
    if block != bytes(_BLOCK_BYTES):
        reason = (
            "the file ends without an end-of-archive mark" if len(block) < _BLOCK_BYTES else "no valid header there"
        )
        raise _broken(samples.uri, position, reason)


def _broken(uri: str, position: int, reason: str) -> JobError:
    return JobError(
        f"Tar {uri}: truncated or damaged at or after byte {position} ({reason}). Copy or make it again, or leave it "
        "out; nothing has been computed yet."
    )


def _refuse_compressed(head: bytes, uri: str) -> None:
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise JobError(
                f"Tar {uri}: compressed with {name}, which allows no random access; expected a plain .tar. Decompress "
                f"it (images hardly shrink): {os.path.basename(uri)} -> .tar."  # noqa: PTH119 - a URI
            )
