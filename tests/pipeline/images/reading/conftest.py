"""Fixtures of the tests of reading."""

from collections.abc import Iterator

import pytest

from pipeline.images.reading import fetch as read_fetch
from pipeline.images.reading.hosts import Hosts
from tests.helpers.servers.web import Web, serving


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as web:
        yield web


@pytest.fixture
def unknown_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host has answered yet, and none is known to be gone."""
    monkeypatch.setattr(read_fetch, "HOSTS", Hosts())
