"""A dataset as a table of references to its images; no pixels yet."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.source_files import File, Found, explained, find_files, scan_in_order, suffix_of, uri_of
from pipeline.source_parquet import find_columns, scan_parquet
from pipeline.source_tar import scan_tar
from schemas.index import REFERENCES

__all__ = ["Kind", "Source", "keys_digest", "list_images"]

Kind = Literal["folder", "tar", "parquet"]

# In order of preference where a WebDataset sample has several.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".mpo",
)  # fmt: skip
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_KIND_OF: dict[str, Kind] = {
    **dict.fromkeys(IMAGE_SUFFIXES, "folder"),
    **dict.fromkeys((".tar", *_COMPRESSED_TARS), "tar"),
    ".parquet": "parquet",
    ".parq": "parquet",
}
_LISTED_SUFFIXES = 8


@dataclass(frozen=True, eq=False)
class Source:
    """The images of one dataset, in a fixed order.

    Attributes:
        kind: how they are stored.
        references: ``schemas.index.REFERENCES``, one row an image: ``key`` (string), ``uri``
            (string, absolute), ``offset`` (int64; tar: byte, Parquet: row, folder: null), ``nbytes`` (int64, null if
            not known), ``label`` (int64, null if none). Keys of a folder are unique, others need not be.
        class_names: name of each label; empty if there are no names.
        image_column: Parquet: the column that holds the images; tar: the extension asked for; else None.
    """

    kind: Kind
    references: pa.Table
    class_names: tuple[str, ...]
    image_column: str | None


def list_images(
    images: str,
    *,
    limit: int | None = None,
    image_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Source:
    """List a dataset: a folder of images, WebDataset tars, or Parquet files.

    ``images`` is a folder (searched to any depth), a file, a glob, or a pattern with ``{000..099}`` or ``{a,b}``;
    local, or ``s3://``, ``gs://``, ``http(s)://`` and whatever else fsspec has. Which kind it is follows from the
    suffixes of the files (case does not matter); files that are neither images, tars nor Parquet are passed over,
    and so are hidden ones.

    * Images: sorted by path relative to the root, which is also the key. If all lie exactly one folder deep, as in
      ImageNet, the sorted names of the folders are the classes.
    * Tars: in the order given, each read through once for its headers; see ``scan_tar``.
    * Parquet: in the order given; see ``find_columns`` and ``scan_parquet``.

    Args:
        images: what to list.
        limit: take the first so many images; no further tar or Parquet file is opened than that needs.
        image_column: Parquet: the column with the images; tar: the extension (``jpg``, ``left.png``). By default the
            first usual one.
        storage_options: keyword arguments for the filesystem, as fsspec takes them.

    Returns:
        The references, in an order that depends on the dataset alone.

    Raises:
        JobError: there is nothing there, no permission or credentials, no image, several kinds at once, or a file
            that cannot be used (a compressed or truncated tar, Parquet without an image column).
        ValueError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"list_images: got limit={limit}, expected at least 1, or None for all images.")
    with explained(images):
        found = find_files(images, suffixes=frozenset(_KIND_OF), storage_options=storage_options)
        kind = _kind_of(images, found.files)
        if kind == "folder" and image_column is not None:
            raise JobError(
                f"Images {images!r}: got image_column={image_column!r} for a folder of images, expected None. It "
                "selects a column of Parquet files or an extension in tars; leave it out."
            )
        files = [file for file in found.files if _KIND_OF.get(suffix_of(file.path)) == kind]
        scan = {"folder": _list_folder, "tar": _list_tars, "parquet": _list_parquet}[kind]
        source = scan(found, files, limit, image_column)
    if source.references.num_rows == 0:
        raise JobError(
            f"Images {images!r}: no images found in {len(files)} {kind} file(s). Expected at least one row"
            f"{f', or one member with the extension {image_column!r}' if kind == 'tar' and image_column else ''}."
        )
    return source


def keys_digest(references: pa.Table) -> str:
    """SHA-256 (hex) of the keys in their order: names a list of images in a configuration."""
    return hashlib.sha256("\n".join(references["key"].to_pylist()).encode()).hexdigest()


def _kind_of(images: str, files: Sequence[File]) -> Kind:
    suffixes = Counter(suffix_of(file.path) for file in files)
    kinds = Counter[Kind]()
    for suffix, count in suffixes.items():
        if suffix in _KIND_OF:
            kinds[_KIND_OF[suffix]] += count
    if len(kinds) == 1:
        return next(iter(kinds))
    if not kinds:
        seen = ", ".join(f"{suffix or 'no suffix'} ({n})" for suffix, n in suffixes.most_common(_LISTED_SUFFIXES))
        raise JobError(
            f"Images {images!r}: no images found. Got {len(files)} visible file(s){f': {seen}' if seen else ''}; "
            f"expected images ({', '.join(IMAGE_SUFFIXES)}), .tar or .parquet. Check the path."
        )
    counts = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(kinds.items()))
    raise JobError(
        f"Images {images!r}: mixed kinds: got {counts}; expected one. Name a folder with one of them, or use a pattern "
        "such as '…/*.tar'."
    )


def _list_folder(found: Found, files: list[File], limit: int | None, image_column: str | None) -> Source:
    # Sorted here too: the alternatives of a brace pattern come in the order written.
    files = sorted(files, key=lambda file: file.relative)
    folders = [file.relative.split("/")[:-1] for file in files]
    class_names: list[str] = []
    labels: list[int | None] = [None] * len(files)
    if all(len(folder) == 1 for folder in folders):
        class_names = sorted({folder[0] for folder in folders})
        index = {name: label for label, name in enumerate(class_names)}
        labels = [index[folder[0]] for folder in folders]
    columns = [
        [file.relative for file in files],
        [uri_of(found.filesystem, file.path) for file in files],
        pa.nulls(len(files), pa.int64()),
        [file.nbytes for file in files],
        labels,
    ]
    return Source("folder", pa.table(columns, schema=REFERENCES).slice(0, limit), tuple(class_names), None)


def _list_tars(found: Found, files: list[File], limit: int | None, image_column: str | None) -> Source:
    scan = partial(scan_tar, found.filesystem, image_suffixes=IMAGE_SUFFIXES, image_extension=image_column)
    return Source("tar", scan_in_order(scan, [file.path for file in files], limit), (), image_column)


def _list_parquet(found: Found, files: list[File], limit: int | None, image_column: str | None) -> Source:
    columns = find_columns(found.filesystem, files[0].path, image_column)
    scan = partial(scan_parquet, found.filesystem, columns=columns)
    references = scan_in_order(scan, [file.path for file in files], limit)
    return Source("parquet", references, columns.class_names, columns.image)
