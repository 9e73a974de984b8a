"""Fixtures of the tests of listing."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for a dataset on each kind of storage."""
    if request.param == "local":
        yield str(tmp_path)
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    else:
        yield request.getfixturevalue("s3_bucket") + "/data"
