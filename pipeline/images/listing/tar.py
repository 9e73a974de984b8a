"""List WebDataset tars as references: the byte range of each image, found by reading the headers."""

import os
from collections.abc import Sequence

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.errors import JobError
from pipeline.images.listing.files import Scan, uri_of
from pipeline.images.listing.findings import About, Tally, add_unused
from pipeline.images.listing.labels import Labels, class_name, text_labels
from pipeline.images.listing.names import IMAGE_SUFFIXES, escaped, looks_like_image, suffix_of
from pipeline.images.listing.ranged_file import RangedFile, open_ranged
from pipeline.images.listing.tar_members import LABEL_BYTES, Member, TarTree, path_of, read_members
from pipeline.images.listing.tar_samples import Chosen, choose_images, label_names
from schemas.index import REFERENCES

__all__ = ["scan_tar"]

_MARGIN = 1000  # members read after the limit, which may be labels of these images or preferred images
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def scan_tar(
    filesystem: AbstractFileSystem, path: str, limit: int | None, *, image_extension: str | None = None
) -> Scan:
    """List the images in one tar; `choose_images` defines which members are images and what their keys are.

    If members are large, only headers are read: the data between them is skipped, unless reading it is faster than
    another request. Labels are the texts of ``.cls`` members, anywhere in the tar; ``.json`` members are not read.

    Links refer to other members, as if the tar were unpacked. Sparse members, whose data is not one byte range, and
    broken links have the offset of their own header and no ``nbytes``; ``pipeline.images.reading.tar_members`` reads
    the former and reports an error for the latter.

    Of several members with the same path, the last one is used, as if the tar were unpacked. Hidden members (a leading
    "." in their path) are left out, like hidden files.

    Args:
        filesystem: of the tar; picklable, because this runs as a task.
        path: of the tar.
        limit: stop after this many images and the next thousand members; the rest is then not checked.
        image_extension: e.g. ``jpg`` or ``left.png``.

    Returns:
        The rows in the order of the members.

    Raises:
        JobError: the tar is compressed, truncated or damaged; the message names the file and, except for a compressed
            one, the byte.
    """
    uri = uri_of(filesystem, path)
    tally = Tally()
    with open_ranged(filesystem, path, uri) as file:
        _refuse_compressed(file.read(6), uri)
        tree = _tree(file, uri, limit, image_extension, tally)
        files = _Files(tree, uri, tally)
        candidates = choose_images([member.name for member in files.members], image_extension, tally)
        chosen = candidates[:limit]
        labels = files.labels(chosen, file, count_unused=limit is None)
    return Scan(files.rows(chosen), labels, tally.findings(), len(candidates))


def _tree(file: RangedFile, uri: str, limit: int | None, image_extension: str | None, tally: Tally) -> TarTree:
    tree = TarTree()
    suffixes = IMAGE_SUFFIXES if image_extension is None else (f".{image_extension.lower()}",)
    images = margin = 0
    for member in read_members(file, uri, tally):
        tree.add(member)
        images += member.name.lower().endswith(suffixes)
        if limit is not None and images >= limit:
            margin += 1
            if margin > _MARGIN:
                break
    return tree


class _Files:
    """Members that are files or links to one, each path once; other members with an image's name are counted.

    Args:
        tree: all members.
        uri: of the tar.
        tally: counts what is not used.
    """

    def __init__(self, tree: TarTree, uri: str, tally: Tally) -> None:
        self._tree, self._uri, self._tally = tree, uri, tally
        self.members: list[Member] = []
        self._data: list[Member | None] = []
        for index, member in enumerate(tree.members):
            self._take(index, member)

    def _take(self, index: int, member: Member) -> None:
        is_image = suffix_of(member.name) in IMAGE_SUFFIXES
        if any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/")):
            if is_image:
                self._count("other", "hidden members with an image's name", member)
            return
        data = self._tree.data_of(index)
        latest = self._tree.latest[path_of(member.name)]
        if data == "folder":
            if member.kind != "folder":
                self._count("other", "links to folders, not entered", member)
        elif latest != index:
            if is_image and self._tree.data_of(latest) == data:
                self._count("other", "duplicate members, used once", member)
            elif is_image:
                self._count("image", "members replaced by a later one of the same name", member)
        elif member.kind == "other":
            if is_image or looks_like_image(member.name):
                self._count("image", "members with an image's name that are not files (a pipe, a device)", member)
        else:
            if not is_image and suffix_of(member.name) != ".cls":
                add_unused(self._tally, member.name, self._example(member))
            file = None if data is None else self._tree.members[data]
            self.members.append(member)
            self._data.append(None if file is None or file.kind == "other" else file)

    def _count(self, about: About, reason: str, member: Member) -> None:
        self._tally.add(about, reason, self._example(member))

    def _example(self, member: Member) -> str:
        return f"{escaped(member.name)} in {self._uri}"

    def rows(self, chosen: Sequence[Chosen]) -> pa.Table:
        """The references of the images."""
        offsets: list[int] = []
        sizes: list[int | None] = []
        for _, index in chosen:
            member, data = self.members[index], self._data[index]
            if data is None:
                self._count("row", "links to no file in their tar", member)
            whole = data is not None and data.kind == "file"
            offsets.append(data.start if data and whole else (data or member).header)
            sizes.append(data.nbytes if data and whole else None)
        columns = [
            [escaped(key) for key, _ in chosen],
            [self._uri] * len(chosen),
            offsets,
            sizes,
            pa.nulls(len(chosen), pa.int64()),
        ]
        return pa.table(columns, schema=REFERENCES)

    def labels(self, chosen: Sequence[Chosen], file: RangedFile, *, count_unused: bool) -> Labels:
        """The texts of the images' ``.cls`` members; with ``count_unused``, those of no image are counted."""
        places = {m.name[: -len(".cls")]: place for place, m in enumerate(self.members) if suffix_of(m.name) == ".cls"}
        used: set[int] = set()
        texts: list[str | None] = []
        for _, index in chosen:
            names = label_names(self.members[index].name)
            place = next((places[name] for name in names if name in places), None)
            texts.append(None if place is None else self._label(place, file))
            used.add(-1 if place is None else place)
        for place in places.values():
            if count_unused and place not in used:
                self._count("label", ".cls members without an image", self.members[place])
        return text_labels(texts)

    def _label(self, place: int, file: RangedFile) -> str | None:
        member, data = self.members[place], self._data[place]
        text = b"" if data is None else data.label
        if text is None and data is not None and data.kind == "file":  # a link to a member with another suffix
            file.seek(data.start)
            text = file.read(min(data.nbytes, LABEL_BYTES))
        name = class_name((text or b"").strip())
        if name is None:
            self._count("label", ".cls members that are too long for a class name", member)
        return name


def _refuse_compressed(head: bytes, uri: str) -> None:
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise JobError(
                f"Tar {uri}: compressed with {name}, which does not support random access; expected a plain .tar. "
                f"Decompress it (images hardly shrink): {os.path.basename(uri)} -> .tar."  # noqa: PTH119 - a URI
            )
