"""The members of a tar from its headers, and what links among them lead to."""

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
_PADDING_BYTES = 1 << 20  # zeros after the end of an archive that are looked through for another one
LABEL_BYTES = 1 << 10  # of a .cls member that are read
_MOST_LINKS = 40  # as Linux follows
_NOT_FILES = (b"D", b"M", b"V", b"N")  # GNU's: contents of folders, continued from another volume, volume label, names

MemberKind = Literal["file", "sparse", "symlink", "link", "folder", "other"]


class Member(NamedTuple):
    """One member.

    Attributes:
        name: as it stands there; bytes that are not UTF-8 are surrogates.
        kind: file: its data is one range of bytes; sparse: it is not; other: a pipe, a device, a part of a file.
        header: byte where its first header begins.
        start: byte where its data begins.
        nbytes: of its data.
        target: of a link.
        label: text of a ``.cls`` member.
    """

    name: str
    kind: MemberKind
    header: int
    start: int
    nbytes: int
    target: str
    label: bytes | None


def open_tar(file: RangedFile) -> tarfile.TarFile:
    """A plain tar whose first header is where ``file`` stands."""
    return tarfile.TarFile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")


def kind_of_member(member: tarfile.TarInfo) -> MemberKind:
    """What a member is; one of an unknown type is a file, as POSIX asks for."""
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
    """Members in order, of all archives in the file (``cat a.tar b.tar``).

    Args:
        file: the tar.
        uri: its name for messages.
        tally: gets what follows the end of the archive.

    Raises:
        JobError: it is truncated or damaged; it names the file and the byte.
    """
    start: int | None = 0
    while start is not None:
        end = yield from _read_archive(file, uri, start)
        start = _next_archive(file, uri, end, tally)


def _read_archive(file: RangedFile, uri: str, start: int) -> Generator[Member, None, int]:
    """Members of the archive that begins at a byte; returns where it ends."""
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
    # tarfile takes a header that is cut off or damaged for the end; the end is a block of zeros.
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
    """Where the archive begins that was appended to one that ends at a byte."""
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
                    "other", "tars with data after their end that is no further archive", f"{uri}, byte {position}"
                )
                return None
            return position
    return None


def _broken(uri: str, position: int, reason: str) -> JobError:
    return JobError(
        f"Tar {uri}: truncated or damaged at or after byte {position} ({reason}). Copy or make it again, or leave it "
        "out; nothing has been computed yet."
    )


def path_of(name: str) -> str:
    """The path of a member below the folder it is unpacked into; the same for ``./a.png`` and ``a.png``."""
    return posixpath.normpath("/" + name).lstrip("/")


class TarTree:
    """Members by path, to follow links among them as if all were unpacked into one folder."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.latest: dict[str, int] = {}  # path -> the last member that has it
        self._linked: dict[int, int] = {}  # hard link -> the member that had the path when it was written
        self._folders: set[str] | None = None

    def add(self, member: Member) -> None:
        """Take the next member."""
        if member.kind == "link" and (index := self.latest.get(path_of(member.target))) is not None:
            self._linked[len(self.members)] = index
        self.latest[path_of(member.name)] = len(self.members)
        self.members.append(member)

    def data_of(self, index: int) -> int | Literal["folder"] | None:
        """The member that has a member's data: itself, or what its links lead to, which may be a folder.

        None: a link that leads to nothing, to itself, or out of the tar.
        """
        for _ in range(_MOST_LINKS):
            member = self.members[index]
            if member.kind not in ("link", "symlink"):
                return "folder" if member.kind == "folder" else index
            found: int | None
            if member.kind == "link":
                found = self._linked.get(index, self.latest.get(path_of(member.target)))
            else:
                path = self._resolved(path_of(member.name).rpartition("/")[0], member.target)
                if path is not None and path not in self.latest and self._is_folder(path):
                    return "folder"
                found = None if path is None else self.latest.get(path)
            if found is None or found == index:
                return None
            index = found
        return None

    def _resolved(self, folder: str, target: str) -> str | None:
        """The path that a symbolic link in a folder names, with all links on the way followed; None: out of the tar."""
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
