"""Fixtures of the tests of jobs."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen crops of scikit-image's photographs, in two classes."""
    import skimage
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    pictures = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in names]
    for i in range(14):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        left, top = 7 * i, 5 * i
        crop = pictures[i % len(pictures)].crop((left, top, left + 170 + i, top + 150))
        crop.save(folder / "ab"[i % 2] / f"{i:02}.png")
    return folder
