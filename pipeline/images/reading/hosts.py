"""A dead host in a column of URLs, told from a dead network.

A URL whose host is gone is a failed row: no waiting brings it back, and a column of URLs has many such. But a host can
seem gone because this machine has lost its network, or its name server, and then nothing is known of any URL. So no
host counts as gone unless another one answers at that moment.
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
    """Which hosts answered lately, and which are known to be gone. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: OrderedDict[str, str] = OrderedDict()  # host -> a URL of it, the latest last
        self._dead: OrderedDict[str, float] = OrderedDict()  # host -> when it may be asked patiently again

    def answered(self, uri: str) -> None:
        """Note that the host of a URL has just answered."""
        host = host_of(uri)
        with self._lock:
            self._dead.pop(host, None)
            self._answered[host] = uri
            self._answered.move_to_end(host)
            if len(self._answered) > _WITNESSES:
                self._answered.popitem(last=False)

    def is_known_dead(self, uri: str) -> bool:
        """Whether `is_dead` said so of the URL's host in the last minutes."""
        with self._lock:
            return self._dead.get(host_of(uri), 0.0) > time.monotonic()

    def is_dead(self, uri: str, ask: Callable[[str], object]) -> bool:
        """Whether another host answers now, so that it is this URL's host that does not.

        Args:
            uri: whose host could not be reached.
            ask: reads from a URL; raises as the storage does.
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


HOSTS = Hosts()  # of this process: what one shard met helps the next


def host_of(uri: str) -> str:
    """Host and port of an ``http(s)://`` URL; "" of anything else."""
    protocol, _, _ = uri.partition("://")
    try:
        return urlsplit(uri).netloc.rpartition("@")[2].lower() if protocol in ("http", "https") else ""
    except ValueError:  # no URL
        return ""


def is_answer(error: BaseException) -> bool:
    """Whether a host has answered, e.g. 404; not that something in between has failed."""
    status = 404 if isinstance(error, FileNotFoundError) else http_status(error)
    return status is not None and status < 500 and not is_unreachable(error)


def _answers(url: str, ask: Callable[[str], object]) -> bool:
    try:
        ask(url)
    except Exception as error:
        return is_answer(error)
    return True
