"""The picture of a store."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont

from densefeat import FeatureStore
from jobs.pictures import _fitted, feature_colours
from jobs.show_features import ShowConfig, show
from jobs.upsample_imagenet import upsample
from pipeline.errors import JobError
from pipeline.evaluate.data.originals import read_photo, stored_geometry
from pipeline.images.decoding.decode import decode
from schemas.options import UpsampleConfig
from tests.helpers.datasets import put, tar_of
from tests.helpers.photographs import photo
from tests.helpers.stores import make_store


@pytest.mark.parametrize(("weights", "components"), [("random", 4), (None, 3), ("random", 2), (None, 1)])
def test_a_picture_of_a_store(tmp_path: Path, weights: str | None, components: int) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(photo(96, 96))
    job = UpsampleConfig(
        images=str(tmp_path / "photos"), store=str(tmp_path / "store"), backbone="resnet18", weights="random",
        layer="2", size="64", components=components, workers=0, device="cpu",
    )  # fmt: skip
    assert upsample(job) == 0
    picture = tmp_path / "new" / "picture.PNG"
    assert show(ShowConfig(store=job.store, output=str(picture), weights=weights)) == 0
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape[1] > 2 * 64
    assert pixels.shape[0] > 2 * 64
    assert pixels.std() > 10


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_pictures_of_images_within_files(tmp_path: Path, kind: str) -> None:
    photos = {f"{name}.png": photo(96, 80 + i, "PNG") for i, name in enumerate("abc")}
    put(str(tmp_path), photos)
    table = pa.table({"image": list(photos.values())})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.tar").write_bytes(tar_of(photos))
    (tmp_path / "x.txt").write_text("\n".join(photos))
    images = tmp_path / {"tar": "x.tar", "parquet": "x.parquet", "list": "x.txt"}[kind]
    job = UpsampleConfig(
        images=str(images), store=str(tmp_path / "store"), backbone="resnet18", weights="random", layer="2",
        size="64", components=4, workers=0, device="cpu",
    )  # fmt: skip
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    for row, data in enumerate(photos.values()):
        assert (read_photo(store, row) == decode(data, stored_geometry(store)).pixels).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": (0, 2, -3)}, r"--rows \[2, -3\] have no features: row 2 \(class/002\.jpg\) is corrupt; row -3 .*008"),
        ({"rows": (99,)}, r"--rows \[99\]: the store has rows 0 … 10"),
        ({"rows": (0,) * 700, "output": "/tmp/x.webp"}, r"700 rows make a picture of \d+×\d+ .* at most 16383 .* WEBP"),
        ({"rows": (0,) * 3000}, r"at most 65500 on a side of a PNG file: name fewer --rows"),
        ({"output": "/proc/picture.png"}, r"--output /proc/picture.png cannot be written"),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, options: dict[str, object], words: str) -> None:
    store = make_store(str(tmp_path / "store"))
    with pytest.raises(JobError, match=words):
        show(ShowConfig(**{"store": store.uri, "output": str(tmp_path / "x.png"), **options}))


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\u2028b.jpg", "tab\t.jpg", "ü.jpg"])
def test_keys_with_line_breaks(name: str) -> None:
    font = ImageFont.load_default(12)
    shown = _fitted(name, font, 200, keep_end=True)
    assert shown.isprintable()
    assert shown.endswith(".jpg")


def test_the_picture_has_a_known_kind() -> None:
    with pytest.raises(ValueError, match=r"--output must be a picture.*x\.gif"):
        ShowConfig(store="store", output="x.gif")


def test_colours_of_few_components() -> None:
    ramp = np.linspace(0, 1, 101, dtype=np.float32).reshape(1, 1, 101)
    (grey,) = feature_colours([ramp])
    assert (grey == grey[..., :1]).all()
    assert grey[0, 0, 0] == 0
    assert grey[0, -1, 0] == 255
    (two,) = feature_colours([np.concatenate([ramp, 1 - ramp])])
    assert two[0, 0].tolist() == [0, 255, 255]
    assert two[0, -1].tolist() == [255, 0, 0]
    (three,) = feature_colours([np.concatenate([ramp, 1 - ramp, ramp, -ramp])])
    assert three[0, -1].tolist() == [255, 0, 255]
    (flat,) = feature_colours([np.full((1, 2, 2), 7, np.float32)])  # nothing to see, and no warning
    assert (flat == flat[0, 0]).all()
