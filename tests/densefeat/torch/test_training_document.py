"""The program in docs/training.md runs as it stands there."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densefeat import FeatureStore
from densefeat.storage.objects import Objects
from tests.helpers.stores import FAILED_ROWS, ROWS, make_store

ROOT = Path(__file__).parents[3]
PROGRAM = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)[1]  # type: ignore[index]


def write_masks(uri: str, store: FeatureStore) -> None:
    """Classes that a linear classifier can tell from the features, on the pixels of the originals."""
    for row in set(range(ROWS)) - set(FAILED_ROWS):
        first = store.read(row)[0]
        mask = store.align(np.digitize(first, first.std() * np.array([-0.5, 0.5])), row, to="image", fill=255)
        data = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8)).save(data, "PNG")
        Objects(uri).put(store.keys[row].replace(".jpg", ".png"), data.getvalue())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=[pytest.mark.s3, pytest.mark.slow])])
def test_the_probe_learns(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert len(PROGRAM.strip().splitlines()) <= 30
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3_bucket")
    store = FeatureStore(make_store(f"{root}/store").uri)
    write_masks(f"{root}/masks", store)
    script = tmp_path / "probe.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), f"{root}/store", f"{root}/masks", "3"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(re.fullmatch(r"mean IoU (\d\.\d+)\n", done.stdout)[1]) > 0.5  # type: ignore[index]
