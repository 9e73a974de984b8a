from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.features.backbone import build_backbone

GOLDEN = Path(__file__).parents[5] / "shared" / "reference" / "featup_implicit.npz"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    return {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("test_resnet", size=(64, 96), weights="random", layer=-1)
