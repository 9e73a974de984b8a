"""The store that the page shows, opened again while it is being made."""

import threading
import time
from functools import cached_property
from typing import Any

import numpy.typing as npt

from densefeat import layout
from densefeat.page.cache import ByteCache
from densefeat.page.features import Features
from densefeat.page.figures import RecordedShards, manifest_figures, store_figures
from densefeat.page.listing import counts, matching_rows
from densefeat.page.sample import Sample
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore

__all__ = ["Library", "Shown"]

_FILTERS_BYTES = 64 << 20


class Shown:
    """A store as it was when it was opened, and what is kept of it.

    Args:
        uri: of the store.
        storage_options: passed to fsspec.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None) -> None:
        self.objects = Objects(uri, storage_options)
        self.finished = self.objects.exists(layout.MANIFEST)  # before the index: it may be finished in between
        self.store = FeatureStore(uri, storage_options)
        self.class_names = [str(name) for name in self.store.attributes.get("class_names") or ()]
        self.counts = counts(self.store.index, self.class_names)
        self.features = Features(self.store)
        self.sample = Sample(self.features)
        self.opened = time.monotonic()
        self._filtered: ByteCache[npt.NDArray[Any]] = ByteCache(_FILTERS_BYTES, lambda rows: rows.nbytes)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The store in figures; of an unfinished store, without those of its shards."""
        found = store_figures(self.store)
        return {**found, **manifest_figures(self.objects)} if self.finished else found

    def rows(self, text: str, status: str, label: int | None) -> npt.NDArray[Any]:
        """As `densefeat.page.listing.matching_rows`."""
        return self._filtered.get(
            (text, status, label),
            lambda: matching_rows(self.store.index, text=text, status=status, label=label),
        )


class Library:
    """Opens the store, and again every ``refresh_s`` seconds until it is finished.

    Raises:
        StoreError, OSError: as for ``densefeat.FeatureStore``.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None, *, refresh_s: float = 10.0) -> None:
        self._uri, self._options, self._refresh_s = uri, storage_options, refresh_s
        self._lock = threading.Lock()
        self._shown = Shown(uri, storage_options)
        self.recorded = RecordedShards(self._shown.objects)

    def shown(self) -> Shown:
        """The store as it is now, or was at most ``refresh_s`` seconds ago."""
        shown = self._shown
        if shown.finished or time.monotonic() - shown.opened < self._refresh_s:
            return shown
        with self._lock:
            if self._shown is shown:
                self._shown = Shown(self._uri, self._options)
            return self._shown
