"""Stores that the tests of datasets read."""

import pytest

from tests.helpers.stores import KnownStore, make_store


@pytest.fixture(scope="module", params=["int8", "float16"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / request.param), request.param)


@pytest.fixture(scope="module")
def known8(tmp_path_factory: pytest.TempPathFactory) -> KnownStore:
    return make_store(str(tmp_path_factory.mktemp("store") / "int8"))
