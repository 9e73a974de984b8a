"""Fixtures of the tests on clusters."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of a photograph of scikit-image's."""
    import skimage
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    picture = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png")
    for i in range(12):
        picture.crop((4 * i, 2 * i, 4 * i + 128, 2 * i + 128)).save(folder / f"{i:02}.jpg")
    return folder
