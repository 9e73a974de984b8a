"""A store to which images are appended."""

import shutil
from pathlib import Path

import pytest

from jobs.upsample_imagenet import upsample
from tests.helpers.upsample_jobs import FIRST, config, names_of, some


@pytest.fixture(scope="module")
def made(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``store``, and the folder ``images`` of which it was made: copy both."""
    folder = tmp_path_factory.mktemp("made")
    some(photographs, folder / "images", names_of(photographs)[:FIRST])
    assert upsample(config(folder / "images", folder / "store")) == 0
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store; its images are gone."""
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"
