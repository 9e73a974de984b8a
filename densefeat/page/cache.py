"""A cache with a bound in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["ByteCache"]

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """The most recently used values, at most ``max_bytes`` of them together. Thread-safe.

    Args:
        max_bytes: the bound; a value that is larger by itself is returned, and not kept.
        size: bytes of a value.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of ``key``, made if it is not there. Errors of ``make`` are raised, and not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()  # without the lock: two threads may make the same value, and others do not wait
        with self._lock:
            if key not in self._values and self._size(value) <= self.max_bytes:
                self._values[key] = value
                self.nbytes += self._size(value)
                while self.nbytes > self.max_bytes:
                    _, oldest = self._values.popitem(last=False)
                    self.nbytes -= self._size(oldest)
        return value
