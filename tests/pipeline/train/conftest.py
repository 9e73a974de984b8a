"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.train_upsampler import train_upsampler
from tests.helpers.trainings import train_config, write_photographs


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """In a whole module: sums over another number of threads differ in the last bit, and all bits are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder / "train", 6)
    write_photographs(folder / "val", 3, first=6)
    return folder


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of eight steps that nothing interrupts."""
    output = tmp_path_factory.mktemp("undisturbed") / "training"
    assert train_upsampler(train_config(photographs, output, steps=8)) == 0
    return output
