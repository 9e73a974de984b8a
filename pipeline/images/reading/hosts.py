"""Distinguish a dead host in a column of URLs from a dead network.

A URL whose host is gone is a failed row: retrying does not help, and columns of URLs contain many of them. But a host
can also seem gone because this machine has lost its network or its name server; then the state of every URL is
unknown. So a host counts as gone only if another one answers at that moment.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from densefeat.storage.failures import http_status, is_unreachable

__all__ = ["HOSTS", "Hosts", "host_of", "is_answer"]

_WITNESSES = 3
_DEAD_REMEMBERED = 10_000
_DEAD_FOR_S = 600.0


class Hosts:
    """Hosts that answered recently, and hosts known to be gone. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: OrderedDict[str, str] = OrderedDict()  # host -> one of its URLs, most recent last
        self._dead: OrderedDict[str, float] = OrderedDict()  # host -> time until which it counts as dead

    def answered(self, uri: str) -> None:
        """Record that the host of a URL has just answered."""
        host = host_of(uri)
        with self._lock:
            self._dead.pop(host, None)
            self._answered[host] = uri
            self._answered.move_to_end(host)
            if len(self._answered) > _WITNESSES:
                self._answered.popitem(last=False)

    def is_known_dead(self, uri: str) -> bool:
        """Whether `is_dead` was true for the URL's host within the last ten minutes."""
        with self._lock:
            return self._dead.get(host_of(uri), 0.0) > time.monotonic()

    def is_dead(self, uri: str, ask: Callable[[str], object]) -> bool:
        """Whether another host answers now, so that only this URL's host is unreachable.

        Args:
            uri: URL whose host could not be reached.
            ask: reads from a URL; raises the storage's errors.
        """
        host = host_of(uri)
        with self._lock:
            witnesses = [url for other, url in reversed(self._answered.items()) if other != host]
        if not any(_answers(url, ask) for url in witnesses):
            return False
        with self._lock:
            self._dead[host] = time.monotonic() + _DEAD_FOR_S
            if len(self._dead) > _DEAD_REMEMBERED:
                self._dead.popitem(last=False)
        return True


HOSTS = Hosts()  # shared by all shards of this process


def host_of(uri: str) -> str:
    """Host and port of an ``http(s)://`` URL; "" for anything else."""
    protocol, _, _ = uri.partition("://")
    try:
        return urlsplit(uri).netloc.rpartition("@")[2].lower() if protocol in ("http", "https") else ""
    except ValueError:  # not a URL
        return ""


def is_answer(error: BaseException) -> bool:
    """Whether the host itself has answered (e.g. 404), rather than something in between having failed."""
    status = 404 if isinstance(error, FileNotFoundError) else http_status(error)
    return status is not None and status < 500 and not is_unreachable(error)


def _answers(url: str, ask: Callable[[str], object]) -> bool:
    try:
        ask(url)
    except Exception as error:
        return is_answer(error)
    return True
