"""The object storage of a chaos run: an S3 server on this machine, behind a proxy that is slow and fails as told."""

import hashlib
import logging
import os
import re
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.servers.s3_proxy import S3Proxy

__all__ = ["BUCKET", "Storage", "running_storage"]

BUCKET = "chaos"
_LATENCY_S = 0.1  # of every request; S3's are some tens of milliseconds, and this machine's none
_RECORD = re.compile(r"/_ledger/(\d{6,})\.parquet$")
_INTENT = re.compile(r"/_intents/(\d{6,})-\w+\.parquet$")
_IMAGE = re.compile(r"/photographs/(\d{5}\.jpg)$")


@dataclass
class Storage:
    """Faults to come, and what was seen.

    Attributes:
        endpoint: of the server itself, without faults.
        proxy: in front of it.
        spoiled: requests that got each kind of fault.
        records: shards with a record in the ledger.
        intents: shard -> digests of the intents written for it: one for each time that it was computed to its end.
        reads: image -> times that it was read for shards.
    """

    endpoint: str
    proxy: S3Proxy
    spoiled: Counter[str] = field(default_factory=Counter)
    records: set[int] = field(default_factory=set)
    intents: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    reads: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._next: list[str] = []  # faults of the next requests
        self._down_until = 0.0
        self.proxy.fault, self.proxy.passed = self._fault, self._passed

    def spoil(self, kind: str, requests: int) -> None:
        """Let the next requests have a fault, as named by `S3Proxy`."""
        with self._lock:
            self._next += [kind] * requests

    def go_down(self, seconds: float) -> None:
        """Answer nothing for a while."""
        self._down_until = time.monotonic() + seconds

    def _fault(self, method: str, path: str) -> str:
        with self._lock:
            fault = self._next.pop(0) if self._next else ""
            if time.monotonic() < self._down_until:
                fault = "cut"
            if fault:
                self.spoiled[fault.partition("-")[0]] += 1
        return fault or f"stall-{_LATENCY_S}"

    def _passed(self, method: str, path: str, body: bytes, status: int) -> None:
        path = path.partition("?")[0]
        if status >= 300:
            return
        with self._lock:
            if method == "GET" and (image := _IMAGE.search(path)):
                self.reads[image[1]] += 1
            elif method == "PUT" and (record := _RECORD.search(path)):
                self.records.add(int(record[1]))
            elif method == "PUT" and (intent := _INTENT.search(path)):
                self.intents[int(intent[1])].add(hashlib.sha256(body).hexdigest())
            elif method == "PUT" and path.endswith("/index.parquet") and not self.intents:
                self.reads.clear()  # the store is set up: these were for the basis and the calibration

    def environment(self, *, faults: bool) -> dict[str, str]:
        """Variables with which clients find the storage."""
        return {
            "AWS_ENDPOINT_URL": self.proxy.endpoint if faults else self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def put(self, prefix: str, files: Mapping[str, bytes]) -> None:
        """Write files, without faults."""
        filesystem = self._filesystem()
        filesystem.pipe({f"{BUCKET}/{prefix}/{name}": data for name, data in files.items()})

    def read(self, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix by key, without faults."""
        filesystem = self._filesystem()
        paths = filesystem.find(f"{BUCKET}/{prefix}")
        found = filesystem.cat(paths) if paths else {}
        return {path.removeprefix(f"{BUCKET}/{prefix}/"): data for path, data in found.items()}

    def delete(self, prefix: str) -> None:
        """Delete all objects below a prefix."""
        self._filesystem().rm(f"{BUCKET}/{prefix}", recursive=True)

    def _filesystem(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(endpoint_url=self.endpoint, key="test", secret="test", skip_instance_cache=True)


@contextmanager
def running_storage() -> Iterator[Storage]:
    """A server with an empty bucket, and its proxy."""
    from moto.server import ThreadedMotoServer

    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it has a line for every request
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        with S3Proxy(endpoint, checks_clocks=True).running() as proxy:
            urllib.request.urlopen(f"{endpoint}/moto-api/reset", b"").close()  # it keeps buckets of earlier servers
            storage = Storage(endpoint, proxy)
            storage._filesystem().mkdir(BUCKET)
            yield storage
    finally:
        server.stop()
