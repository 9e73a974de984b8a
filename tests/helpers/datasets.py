"""Tars and folders made for tests, and what comes of listing and reading them."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import ImageError
from pipeline.images.listing.source import Source
from pipeline.images.reading.read import read_images


def put(root: str, files: dict[str, bytes]) -> None:
    """Files by name below ``root``, on any kind of storage."""
    filesystem, path = fsspec.core.url_to_fs(root)
    for name, data in files.items():
        filesystem.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{path}/{name}", data)


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options: Any) -> Path:
    """A tar of members in order; the same name may come twice."""
    with tarfile.open(path, "w", errors="surrogateescape", **options) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_of(members: dict[str, bytes], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of a tar of members by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def column(source: Source, name: str) -> list[Any]:
    return source.references[name].to_pylist()


def read(source: Source, start: int = 0, count: int | None = None, **options: Any) -> list[bytes | ImageError]:
    """Of all rows, or of ``count`` of them from ``start`` on."""
    with ThreadPoolExecutor(4) as pool:
        rows = source.references.slice(start, count)
        return list(read_images(rows, image_column=source.image_column, kind=source.kind, pool=pool, **options))


def by_key(source: Source) -> dict[str, bytes | str]:
    """The bytes of each image, or the status of one that cannot be read."""
    outcomes = (image.status if isinstance(image, ImageError) else image for image in read(source))
    return dict(zip(column(source, "key"), outcomes, strict=True))


def found(source: Source, about: str) -> dict[str, int]:
    """Counts of the findings of one kind, by reason."""
    return {finding.reason: finding.count for finding in source.findings if finding.about == about}
