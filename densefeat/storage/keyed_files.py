"""The labels of a dataset: files named by key in one folder."""

import errno
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order

__all__ = ["KeyedFiles"]

_PROBED = 8  # keys, before the folder is listed


class KeyedFiles:
    """Files named by key: of ``class/001.jpg``, ``class/001.jpg.png`` or, if there is none, ``class/001.png``.

    Picklable.

    Args:
        objects: the folder.
        contents: of a file, for messages, e.g. "mask".
        suffixes: of files, those that are preferred first, e.g. ".png".
    """

    def __init__(self, objects: Objects, contents: str, *suffixes: str) -> None:
        self.objects, self._contents, self._suffixes = objects, contents, suffixes

    def names(self, key: str) -> list[str]:
        """Names that the file of a key may have, in the order of preference."""
        path = PurePosixPath(key)  # without "." and double slashes, as the names of a listing are
        bases = (str(path), str(path.with_suffix("")))
        return [f"{base}{suffix}" for base in dict.fromkeys(bases) for suffix in self._suffixes]

    def get(self, key: str) -> tuple[str, bytes]:
        """The name of a key's file, and its bytes.

        Raises:
            FileNotFoundError: there is none.
        """
        names = self.names(key)
        for name in names:
            try:
                return name, self.objects.get(name)
            except OSError as error:
                if not _is_absent(error):
                    raise
        raise FileNotFoundError(
            f"{self.objects.uri} has no {self._contents} for {key!r}: expected {' or '.join(names)}"
        )

    def first(self, keys: Sequence[str]) -> str | None:
        """The first of ``keys`` that has a file; None if none has.

        Usually the first key has one. If none of the first few has, the folder is listed.

        Raises:
            FileNotFoundError: the folder is empty or does not exist.
        """
        can_list = self.objects.can_list
        probed = keys[:_PROBED] if can_list else keys
        found = next((key for key in probed if any(map(self._readable, self.names(key)))), None)
        if found is not None or not can_list:
            return found
        missing = set(self.missing(keys))
        return next((key for key in keys if key not in missing), None)

    def _readable(self, name: str) -> bool:
        try:
            return self.objects.exists(name)
        except PermissionError:  # how a bucket that cannot be listed answers for a missing object
            return False
        except OSError as error:
            if not _is_absent(error):
                raise
            return False

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that have no file, by one listing of the folder (over http, by a request per name).

        Raises:
            FileNotFoundError: the folder is empty or does not exist.
        """
        keys = list(keys)
        if not self.objects.can_list:
            exist = in_order(lambda key: any(map(self.objects.exists, self.names(key))), keys)
            return [key for key, exists in zip(keys, exist, strict=True) if not exists]
        found = set(self.objects.list())
        if not found:
            example = " or ".join(f"KEY{suffix}" for suffix in self._suffixes)
            raise FileNotFoundError(
                f"{self.objects.uri} has no files: expected {self._contents}s named by key, e.g. {example}"
            )
        return [key for key in keys if found.isdisjoint(self.names(key))]


def _is_absent(error: OSError) -> bool:
    """Whether there is no such file, maybe because no file can have the name: a suffix can make it too long."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ENAMETOOLONG
