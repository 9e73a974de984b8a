"""List a dataset as a table of references to its images; pixels are not read."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.images.listing.files import File, Found, Scan, ScanMap, explained, find_files, scan_in_order, uri_of
from pipeline.images.listing.findings import Finding, Tally, add_unused
from pipeline.images.listing.labels import Labels, folder_label, text_labels, unify_labels
from pipeline.images.listing.lists import is_list, scan_list
from pipeline.images.listing.names import IMAGE_SUFFIXES, KIND_OF, escaped, suffix_of
from pipeline.images.listing.parquet import image_column_of, scan_parquet
from pipeline.images.listing.tar import scan_tar
from schemas.configuration import SourceKind
from schemas.index import REFERENCES

__all__ = ["Source", "keys_digest", "list_images"]

_LISTED_SUFFIXES = 8


@dataclass(frozen=True, eq=False)
class Source:
    """The images of one dataset, in a fixed order.

    Attributes:
        kind: how the images are stored.
        references: ``schemas.index.REFERENCES``, one row per image: ``key`` (string), ``uri``
            (string, absolute), ``offset`` (int64; tar: byte, Parquet: row, folder: null), ``nbytes`` (int64, null if
            not known), ``label`` (int64, null if none). Keys of a folder are unique; others may not be. In keys and
            local paths, bytes that are not UTF-8 are escaped by ``pipeline.images.listing.names.escaped``.
        class_names: name of each label; empty if there are no names.
        image_column: Parquet, CSV: the column that holds the images; tar: the requested extension; else None.
        findings: everything that was examined but not used, by reason.
        candidates: number of images examined, including those beyond a limit and findings of kind "image".
    """

    kind: SourceKind
    references: pa.Table
    class_names: tuple[str, ...]
    image_column: str | None
    findings: tuple[Finding, ...] = ()
    candidates: int = 0


def list_images(
    images: str,
    *,
    limit: int | None = None,
    image_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    scan_map: ScanMap | None = None,
) -> Source:
    """List a dataset: a folder of images, a list of their paths, WebDataset tars, or Parquet files.

    ``images`` is a folder (searched to any depth, linked folders too), a file, a glob, or a pattern with
    ``{000..099}`` or ``{a,b}``; local, or ``s3://``, ``gs://``, ``http(s)://`` or any other fsspec protocol. A folder
    that matches a pattern is searched like one named directly, and a file that matches twice is listed once. The kind
    of dataset follows from the suffixes of the files (case-insensitive). Other files and hidden files are left out and
    counted in ``Source.findings``.

    * Images: sorted by path relative to the root, which is also the key. If all lie exactly one folder deep, as in
      ImageNet, the sorted names of the folders are the classes.
    * A list (``.txt``, ``.csv``, ``.tsv``): in the order given; see ``scan_list``.
    * Tars: in the order given; see ``scan_tar``.
    * Parquet: in the order given; see ``scan_parquet``.

    Labels of tars and Parquet are numbered consistently over all files, see ``unify_labels``; a file without labels
    in a folder ``label=…`` takes the label of the folder.

    Args:
        images: what to list.
        limit: maximum number of images, from the start; only the tar or Parquet files needed for it are opened.
        image_column: Parquet, CSV: the column with the images; tar: the extension (``jpg``, ``left.png``). By default
            the first usual one.
        storage_options: keyword arguments for the filesystem, passed to fsspec.
        scan_map: runs the scans of several remote tars or Parquet files; None: threads of this process.

    Returns:
        The references, in an order that depends only on the dataset.

    Raises:
        JobError: the dataset does not exist, permission or credentials are missing, it has no images or mixes kinds,
            or a file cannot be used (a compressed or truncated tar, Parquet without an image column).
        StorageUnavailable: the storage does not answer.
        ValueError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"list_images: got limit={limit}, expected at least 1, or None for all images.")
    tally = Tally()
    if is_list(images):
        return _from_list(images, limit, image_column, storage_options, tally)
    with explained(images):
        found = find_files(images, suffixes=frozenset(KIND_OF), tally=tally, storage_options=storage_options)
        kind = _kind_of(images, found.files)
        if kind == "folder" and image_column is not None:
            raise JobError(
                f"Images {images!r}: got image_column={image_column!r} for a folder of images, expected None. It "
                "selects a column of Parquet files or an extension in tars; omit it."
            )
        files = [file for file in found.files if _has_kind(file, kind, tally)]
        if kind == "folder":
            source = _list_folder(found, files, limit, tally)
        else:
            source = _list_files(kind, found, files, limit, image_column, tally, scan_map)
    if source.references.num_rows == 0:
        raise JobError(
            f"Images {images!r}: no images found in {len(files)} {kind} file(s). Expected at least one row"
            f"{f', or one member with the extension {image_column!r}' if kind == 'tar' and image_column else ''}."
            f"{''.join(f' Got {finding}.' for finding in source.findings[:_LISTED_SUFFIXES])}"
        )
    return source


def _from_list(
    images: str,
    limit: int | None,
    image_column: str | None,
    storage_options: Mapping[str, Any] | None,
    tally: Tally,
) -> Source:
    with explained(images):
        scan, column = scan_list(images, image_column=image_column, storage_options=storage_options)
    for finding in scan.findings:
        tally.add(finding.about, finding.reason, finding.example, finding.count)
    labels, class_names = unify_labels([scan.labels], tally)
    references = scan.references.set_column(REFERENCES.get_field_index("label"), REFERENCES.field("label"), labels)
    if not references.num_rows:
        raise JobError(f"Images {images!r}: the list has no images. Expected a path or URI per row.")
    return _source("list", references.slice(0, limit), class_names, column, tally, references.num_rows)


def keys_digest(references: pa.Table) -> str:
    """SHA-256 (hex) of the keys in order; identifies the list of images in a configuration."""
    return hashlib.sha256("\n".join(references["key"].to_pylist()).encode()).hexdigest()


def _kind_of(images: str, files: Sequence[File]) -> SourceKind:
    suffixes = Counter(suffix_of(file.path) for file in files)
    kinds = Counter[SourceKind]()
    for suffix, count in suffixes.items():
        if suffix in KIND_OF:
            kinds[KIND_OF[suffix]] += count
    if len(kinds) == 1:
        return next(iter(kinds))
    if not kinds:
        seen = ", ".join(f"{suffix or 'no suffix'} ({n})" for suffix, n in suffixes.most_common(_LISTED_SUFFIXES))
        raise JobError(
            f"Images {images!r}: no images found. Got {len(files)} visible file(s){f': {seen}' if seen else ''}; "
            f"expected images ({', '.join(IMAGE_SUFFIXES)}), .tar or .parquet; or name a list of images (.txt, .csv, "
            ".tsv). Check the path."
        )
    counts = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(kinds.items()))
    raise JobError(
        f"Images {images!r}: mixed kinds: got {counts}; expected one. Name a folder with one of them, or use a pattern "
        "such as '…/*.tar'."
    )


def _has_kind(file: File, kind: SourceKind, tally: Tally) -> bool:
    if KIND_OF.get(suffix_of(file.path)) == kind:
        return True
    add_unused(tally, file.relative, escaped(file.relative))
    return False


def _list_folder(found: Found, files: list[File], limit: int | None, tally: Tally) -> Source:
    # Sort again: the alternatives of a brace pattern come in the order written.
    files = sorted(files, key=lambda file: file.relative)
    folders = [file.relative.split("/")[:-1] for file in files]
    class_names: list[str] = []
    labels: list[int | None] = [None] * len(files)
    if all(len(folder) == 1 for folder in folders):
        class_names = sorted({folder[0] for folder in folders})
        index = {name: label for label, name in enumerate(class_names)}
        labels = [index[folder[0]] for folder in folders]
    if found.is_local:
        for file in files:
            if file.nbytes is None:
                tally.add("row", "files that cannot be accessed, such as broken links", escaped(file.relative))
    columns = [
        [escaped(file.relative) for file in files],
        [uri_of(found.filesystem, file.path) for file in files],
        pa.nulls(len(files), pa.int64()),
        [file.nbytes for file in files],
        labels,
    ]
    references = pa.table(columns, schema=REFERENCES).slice(0, limit)
    names = tuple(escaped(name) for name in class_names)
    return _source("folder", references, names, None, tally, len(files))


def _list_files(
    kind: SourceKind,
    found: Found,
    files: list[File],
    limit: int | None,
    image_column: str | None,
    tally: Tally,
    scan_map: ScanMap | None,
) -> Source:
    """The images in tars or Parquet files."""
    paths = [file.path for file in files]
    if kind == "tar":
        scan = partial(scan_tar, found.filesystem, image_extension=image_column)
    else:
        image_column = image_column_of(found.filesystem, paths[0], image_column)
        scan = partial(scan_parquet, found.filesystem, image_column=image_column, names=_names_in_keys(files))
    scans = scan_in_order(scan, paths, limit, None if found.is_local else scan_map)
    for part in scans:
        for finding in part.findings:
            tally.add(finding.about, finding.reason, finding.example, finding.count)
    parts = [_labels_of(part, path) for part, path in zip(scans, paths, strict=False)]
    labels, class_names = unify_labels(parts, tally)
    references = pa.concat_tables([REFERENCES.empty_table(), *(part.references for part in scans)])
    references = references.set_column(REFERENCES.get_field_index("label"), REFERENCES.field("label"), labels)
    candidates = sum(part.candidates for part in scans)
    return _source(kind, references.slice(0, limit), class_names, image_column, tally, candidates)


def _source(
    kind: SourceKind, references: pa.Table, names: tuple[str, ...], column: str | None, tally: Tally, listed: int
) -> Source:
    findings = tally.findings()
    lost = sum(finding.count for finding in findings if finding.about == "image")
    return Source(kind, references, names, column, findings, listed + lost)


def _labels_of(scan: Scan, path: str) -> Labels:
    """The labels of a file; if it has none, the label of its folder."""
    text = folder_label(path)
    rows = scan.references.num_rows
    if text is None or scan.labels.values.null_count < rows:
        return scan.labels
    return text_labels([text] * rows)


def _names_in_keys(files: Sequence[File]) -> dict[str, str]:
    """Name of each file in keys: its stem, or its path without the suffix if stems are not unique."""
    stems = Counter(PurePosixPath(file.path).stem for file in files)
    unique = max(stems.values()) == 1
    names = (PurePosixPath(file.path).stem if unique else file.relative.rpartition(".")[0] for file in files)
    return {file.path: escaped(name) for file, name in zip(files, names, strict=True)}
