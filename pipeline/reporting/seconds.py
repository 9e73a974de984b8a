"""Busy seconds by stage of the pipeline."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class StageSeconds:
    """Busy seconds by stage, summed over threads. Thread-safe."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to the stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to the stage, which may have been spent in another process."""
        with self._lock:
            self._seconds[name] += seconds

    def total(self) -> dict[str, float]:
        """Seconds by stage, rounded to milliseconds."""
        with self._lock:
            return {name: round(seconds, 3) for name, seconds in self._seconds.items()}
