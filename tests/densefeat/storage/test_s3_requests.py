"""How many requests an operation on S3 is, and how many are on their way at the same time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from densefeat.storage.objects import Objects
from densefeat.storage.places import open_uri
from tests.helpers.servers.s3_proxy import S3Proxy

pytestmark = pytest.mark.s3

OPERATIONS: dict[str, tuple[Callable[[Objects], object], list[str]]] = {
    "get": (lambda objects: objects.get("a/b"), ["GET"]),
    "get_range": (lambda objects: objects.get_range("a/b", 1, 3), ["GET"]),
    "size": (lambda objects: objects.size("a/b"), ["HEAD"]),
    "list": (lambda objects: objects.list("a"), ["GET"]),
    "put": (lambda objects: objects.put("a/b", b"new"), ["PUT"]),
    "create": (lambda objects: objects.create("a/new", b"new"), ["PUT"]),
    "delete": (lambda objects: objects.delete("a/b"), ["DELETE"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_one_request(s3_bucket: str, s3_proxy: S3Proxy, name: str) -> None:
    objects = Objects(f"{s3_bucket}/store")
    objects.put("a/b", b"data")
    operation, methods = OPERATIONS[name]
    s3_proxy.seen.clear()
    operation(objects)
    assert [method for method, _ in s3_proxy.seen] == methods


def test_a_missing_object_is_one_request(s3_bucket: str, s3_proxy: S3Proxy) -> None:
    objects = Objects(f"{s3_bucket}/store")
    objects.put("a/b", b"data")
    s3_proxy.seen.clear()
    with pytest.raises(FileNotFoundError):
        objects.get("a/c")
    assert [method for method, _ in s3_proxy.seen] == ["GET"]


def test_forty_requests_are_on_their_way_at_once(s3_bucket: str, s3_proxy: S3Proxy) -> None:
    """None is answered before the last one has come."""
    objects, threads = Objects(f"{s3_bucket}/store"), 40
    objects.put("a", b"data")
    together = threading.Barrier(threads, timeout=60)

    def wait(method: str, path: str) -> str:
        together.wait()
        return ""

    s3_proxy.fault = wait
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(objects.get, ["a"] * threads)) == [b"data"] * threads


def test_own_arguments_count(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"max_pool_connections": 3}
    for scheme in ("s3", "s3a"):
        assert open_uri(f"{scheme}://bucket/a", {"skip_instance_cache": True})[0].config_kwargs == {
            "max_pool_connections": 128
        }
        own, _ = open_uri(f"{scheme}://bucket/a", {"config_kwargs": few})
        assert own.config_kwargs == few
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": few})
        configured, _ = open_uri(f"{scheme}://bucket/a", {"skip_instance_cache": True})
        assert configured.config_kwargs == few
        monkeypatch.delitem(fsspec.config.conf, "s3")
