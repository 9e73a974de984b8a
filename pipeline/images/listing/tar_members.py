"""Read the members of a tar from its headers, and resolve links among them."""

import posixpath
import tarfile
from collections import deque
from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple

from pipeline.errors import JobError
from pipeline.images.listing.findings import Tally
from pipeline.images.listing.ranged_file import RangedFile

__all__ = ["LABEL_BYTES", "Member", "TarTree", "kind_of_member", "open_tar", "path_of", "read_members"]

_BLOCK_BYTES = 512
_PADDING_BYTES = 1 << 20  # zeros after the end of an archive that are searched for another archive
LABEL_BYTES = 1 << 10  # read from a .cls member
_MOST_LINKS = 40  # the limit of Linux
_NOT_FILES = (b"D", b"M", b"V", b"N")  # GNU: folder contents, continued from another volume, volume label, long names

MemberKind = Literal["file", "sparse", "symlink", "link", "folder", "other"]


class Member(NamedTuple):
    """One member.

    Attributes:
        name: as stored; bytes that are not UTF-8 are surrogates.
        kind: file: its data is one byte range; sparse: its data is not; other: a pipe, a device, a part of a file.
        header: byte offset of its first header.
        start: byte offset of its data.
        nbytes: size of its data.
        target: of a link.
        label: first ``LABEL_BYTES`` of a ``.cls`` member; None for others.
    """

    name: str
    kind: MemberKind
    header: int
    start: int
    nbytes: int
    target: str
    label: bytes | None


def open_tar(file: RangedFile) -> tarfile.TarFile:
    """Open a plain tar whose first header is at the current position of ``file``."""
    return tarfile.TarFile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")


def kind_of_member(member: tarfile.TarInfo) -> MemberKind:
    """Kind of a member; an unknown type is treated as a file, as POSIX requires."""
    if member.isdir():
        return "folder"
    if member.issym():
        return "symlink"
    if member.islnk():
        return "link"
    if member.isreg() or member.type not in (*tarfile.SUPPORTED_TYPES, *_NOT_FILES):
        return "file" if member.sparse is None else "sparse"
    return "other"


def read_members(file: RangedFile, uri: str, tally: Tally) -> Iterator[Member]:
    """Yield the members of all archives in the file (``cat a.tar b.tar``), in order.

    Args:
        file: the tar.
        uri: name of the tar in messages.
        tally: counts data after the end of the archive.

    Raises:
        JobError: the tar is truncated or damaged; the message names the file and the byte.
    """
    start: int | None = 0
    while start is not None:
        end = yield from _read_archive(file, uri, start)
        start = _next_archive(file, uri, end, tally)


def _read_archive(file: RangedFile, uri: str, start: int) -> Generator[Member, None, int]:
    """Yield the members of the archive that begins at byte ``start``; return where it ends."""
    position = start
    try:
        file.seek(start)
        with open_tar(file) as tar:
            while (info := tar.next()) is not None:
                position = info.offset
                tar.members.clear()  # type: ignore[attr-defined]  # a million of them would take a gigabyte
                yield _member(tar, info)
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _broken(uri, position, str(error)) from error
    # tarfile treats a truncated or damaged header as the end; the real end is a block of zeros.
    file.seek(position)
    block = file.read(_BLOCK_BYTES)
    if block != bytes(_BLOCK_BYTES):
        short = len(block) < _BLOCK_BYTES
        raise _broken(
            uri, position, "the file ends without an end-of-archive mark" if short else "no valid header there"
        )
    return position


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    kind, label = kind_of_member(info), None
    if kind == "file" and info.name.lower().endswith(".cls"):
        label = tar.fileobj.read(min(info.size, LABEL_BYTES)) if tar.fileobj else b""
    return Member(info.name, kind, info.offset, info.offset_data, info.size, info.linkname, label)


def _next_archive(file: RangedFile, uri: str, end: int, tally: Tally) -> int | None:
    """Start of an archive appended to the one that ends at byte ``end``; None if there is none."""
    for position in range(end, end + _PADDING_BYTES, _BLOCK_BYTES):
        file.seek(position)
        block = file.read(_BLOCK_BYTES)
        if len(block) < _BLOCK_BYTES:
            return None
        if block != bytes(_BLOCK_BYTES):
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.TarError:
                tally.add(
                    "other", "tars with data after their end that is not another archive", f"{uri}, byte {position}"
                )
                return None
            return position
    return None


def _broken(uri: str, position: int, reason: str) -> JobError:
    return JobError(
        f"Tar {uri}: truncated or damaged at or after byte {position} ({reason}). Copy or create it again, or exclude "
        "it; nothing has been computed yet."
    )


def path_of(name: str) -> str:
    """Normalized path of a member, relative to the folder it is unpacked into: ``./a.png`` becomes ``a.png``."""
    return posixpath.normpath("/" + name).lstrip("/")


class TarTree:
    """Members by path; resolves links as if all were unpacked into one folder."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.latest: dict[str, int] = {}  # path -> the last member with that path
        self._linked: dict[int, int] = {}  # hard link -> the member with the target path when the link was added
        self._folders: set[str] | None = None

    def add(self, member: Member) -> None:
        """Add the next member."""
        if member.kind == "link" and (index := self.latest.get(path_of(member.target))) is not None:
            self._linked[len(self.members)] = index
        self.latest[path_of(member.name)] = len(self.members)
        self.members.append(member)

    def data_of(self, index: int) -> int | Literal["folder"] | None:
        """The member that holds the data of a member: itself, or the target of its links, which may be a folder.

        None for a link that is broken, circular, or leads out of the tar.
        """
        for _ in range(_MOST_LINKS):
            member = self.members[index]
            if member.kind not in ("link", "symlink"):
                return "folder" if member.kind == "folder" else index
            target: int | None
            if member.kind == "link":
                target = self._linked.get(index, self.latest.get(path_of(member.target)))
            else:
                path = self._resolved(path_of(member.name).rpartition("/")[0], member.target)
                if path is not None and path not in self.latest and self._is_folder(path):
                    return "folder"
                target = None if path is None else self.latest.get(path)
            if target is None or target == index:
                return None
            index = target
        return None

    def _resolved(self, folder: str, target: str) -> str | None:
        """The target path of a symbolic link in a folder, with all links on the way followed; None: out of the tar."""
        todo = deque(("" if target.startswith("/") else folder).split("/") + target.split("/"))
        done: list[str] = []
        links = 0
        while todo:
            part = todo.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if not done:
                    return None
                done.pop()
                continue
            done.append(part)
            index = self.latest.get("/".join(done))
            if index is not None and self.members[index].kind == "symlink":
                links += 1
                if links > _MOST_LINKS:
                    return None
                following = self.members[index].target
                done = [] if following.startswith("/") else done[:-1]
                todo.extendleft(reversed(following.split("/")))
        return "/".join(done)

    def _is_folder(self, path: str) -> bool:
        if self._folders is None:
            self._folders = {""}
            for name in self.latest:
                while (name := name.rpartition("/")[0]) and name not in self._folders:
                    self._folders.add(name)
        return path in self._folders
