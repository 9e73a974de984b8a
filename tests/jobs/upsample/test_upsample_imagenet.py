"""The main job, end to end: the features that it stores, from every kind of source."""

import io
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from densefeat import FeatureStore, MissingFeatures, TorchFeatures, layout
from jobs.fit_pca import fit_pca
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.reporting.commands import this_python
from pipeline.upsamplers.build import build_upsampler
from schemas.options import FitPcaConfig
from tests.helpers.photographs import orientation_exif, photo, png_header
from tests.helpers.stores import SHARED
from tests.helpers.upsample_jobs import SIZE, config, direct_features, shard_bytes

COCO = SHARED / "data" / "coco200" / "images"

LITE0 = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"

VIT = SHARED / "weights" / "vit_small_patch14_dinov2.focus.safetensors"

needs_shared = pytest.mark.skipif(not COCO.exists(), reason=f"needs the photographs and weights in {SHARED}")

ROOT = Path(__file__).parents[3]
# tests/densefeat/torch/test_training_document.py runs the snippets of docs/training.md.
DOCUMENTS = [ROOT / "README.md", *(one for one in sorted((ROOT / "docs").glob("*.md")) if one.name != "training.md")]


@needs_shared
@pytest.mark.parametrize(
    ("backbone", "weights", "layer", "upsampler", "dtype"),
    [
        ("tf_efficientnet_lite0", LITE0, "-2", "jbu", "int8"),
        ("vit_small_patch14_dinov2.lvd142m", VIT, "10", "jbu", "float16"),
        ("tf_efficientnet_lite0", LITE0, "-2", "bilinear", "int8"),
    ],
)
def test_a_store_of_photographs_reads_back_as_computed_directly(
    tmp_path: Path, backbone: str, weights: Path, layer: str, upsampler: str, dtype: str
) -> None:
    job = config(
        COCO, tmp_path / "store", backbone=backbone, weights=str(weights), layer=layer, size="224",
        components=64, upsampler=upsampler, dtype=dtype, limit=10, batch_size=4, shard_images=8,
    )  # fmt: skip
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    stage = build_backbone(backbone, size=(224, 224), weights=str(weights), layer=job.layers)
    for row in (0, 5, 9):
        expected = direct_features(store, row, stage, build_upsampler(upsampler, None, stage))
        stored = store.read(row)
        # Half a step of rounding, and a little for another order of float32 sums; float16 rounds relatively.
        step = 0 if store.step is None else store.step[:, None, None]
        tolerance = 0.5 * step + 2e-3 * np.abs(expected) + 1e-3 * expected.std()
        inside = np.abs(expected) < (np.inf if store.step is None else 127 * step)
        assert (np.abs(stored - expected) <= tolerance)[np.broadcast_to(inside, expected.shape)].all()
        assert inside.mean() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("upsampler", ["jbu", "bilinear"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_store_made_on_a_gpu_is_that_of_the_definition(
    photographs: Path, tmp_path: Path, upsampler: str, dtype: str
) -> None:
    job = config(photographs, tmp_path / "store", device="cuda", upsampler=upsampler, dtype=dtype)
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    stage = build_backbone(job.backbone, size=(SIZE, SIZE), weights="random", layer=job.layers)
    for row in (0, 13):
        expected = direct_features(store, row, stage, build_upsampler(upsampler, None, stage))
        error = np.linalg.norm(store.read(row) - expected) / np.linalg.norm(expected)
        assert error < 0.06  # bfloat16 in the backbone, and rounding to codes
    made_by = dict(pq.read_table(tmp_path / "store" / layout.MANIFEST)["made_by"][0].as_py())
    assert made_by["upsampled_by"] == ("triton" if upsampler == "jbu" else "plain torch")


def test_what_is_stored_and_reported(photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = config(photographs, tmp_path / "store")
    with caplog.at_level("INFO"):
        assert upsample(job) == 0
    store = FeatureStore(job.store)
    assert store.keys == sorted(f"{'ab'[i % 2]}/{i:02}.png" for i in range(14))
    assert store.attributes["class_names"] == ["a", "b"]
    assert store.index["label"].to_pylist() == [0] * 7 + [1] * 7
    assert store.shape == (8, SIZE, SIZE)
    assert store.index["status"].to_pylist() == ["ok"] * 14
    assert 0 < store.attributes["explained_variance"] <= 1
    assert np.array_equal(zarr.open_group(job.store, mode="r")["features"][3], store.read_codes(3))
    assert len(TorchFeatures(store)) == 14
    report = caplog.text
    for words in (
        "4 of 4 shards done",
        "14 with features, 0 failed",
        "% explained",
        "images/s",
        "backbone",
        "made on     cpu\n",
        f"{this_python()} -m jobs.verify_store --store {job.store}",
    ):
        assert words in report
    assert verify(VerifyConfig(store=job.store)) == 0


def test_a_failed_neighbour_changes_no_bit(photographs: Path, tmp_path: Path) -> None:
    whole = config(photographs, tmp_path / "whole", dtype="float16")
    assert upsample(whole) == 0
    spoiled = tmp_path / "photographs"
    shutil.copytree(photographs, spoiled)
    (spoiled / "a" / "04.png").write_bytes(b"")
    (spoiled / "b" / "05.png").write_bytes((photographs / "b" / "05.png").read_bytes()[:-900])
    job = replace(whole, images=str(spoiled), store=str(tmp_path / "spoiled"), pca=whole.store, max_failed_share=0.5)
    assert upsample(job) == 0
    expected, store = FeatureStore(whole.store), FeatureStore(job.store)
    failed = [row for row, status in enumerate(store.index["status"].to_pylist()) if status != "ok"]
    assert [store.keys[row] for row in failed] == ["a/04.png", "b/05.png"]
    for row in set(range(14)) - set(failed):
        assert np.array_equal(store.read_codes(row), expected.read_codes(row))


ODD_IMAGES = {
    "01_good.jpg": (lambda: photo(90, 120), "ok"),
    "02_truncated.jpg": (lambda: photo(90, 120)[:-200], "corrupt"),
    "03_empty.jpg": (lambda: b"", "corrupt"),
    "04_text.jpg": (lambda: b"<html>404</html>", "unsupported"),
    "05_one_pixel.png": (lambda: photo(1, 1, "PNG"), "too_small"),
    "06_bomb.png": (lambda: png_header(60_000, 60_000), "too_large"),
    "07_rotated.jpg": (lambda: photo(60, 120, exif=orientation_exif(6)), "ok"),
    "08_wide.png": (lambda: photo(10, 1000, "PNG"), "ok"),
}


def test_odd_images_are_failed_rows_and_nothing_else_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (data, _) in ODD_IMAGES.items():
        (folder / name).write_bytes(data())
    job = config(folder, tmp_path / "store", components=4)
    assert upsample(job) == 1  # five of eight failed: more than is allowed
    store = FeatureStore(job.store)
    assert dict(zip(store.keys, store.index["status"].to_pylist(), strict=True)) == {
        name: status for name, (_, status) in ODD_IMAGES.items()
    }
    assert upsample(replace(job, overwrite=True, max_failed_share=0.7)) == 0
    store = FeatureStore(job.store)
    with pytest.raises(MissingFeatures, match="too_large"):
        store.read("06_bomb.png")
    assert np.isfinite(store.read("08_wide.png")).all()
    row = store.row_of("07_rotated.jpg")
    assert (store.index["height"][row].as_py(), store.index["width"][row].as_py()) == (120, 60)
    assert verify(VerifyConfig(store=job.store)) == 0


def test_all_kinds_of_sources_give_the_same_features(photographs: Path, tmp_path: Path) -> None:
    files = sorted(photographs.rglob("*.png"))
    with tarfile.open(tmp_path / "images-000.tar", "w") as tar:
        for path in files:
            member = tarfile.TarInfo(f"{path.parent.name}{path.stem}.png")
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    table = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files]})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=5)
    (tmp_path / "images.txt").write_text("".join(f"{path}\n" for path in files))
    stores = {}
    sources = photographs, tmp_path / "images.txt", tmp_path / "images-{000..000}.tar", tmp_path / "images.parquet"
    for images in sources:
        job = config(images, tmp_path / f"store{len(stores)}")
        assert upsample(job) == 0
        stores[str(images)] = shard_bytes(Path(job.store))
    folder, list_shards, tar_shards, parquet_shards = stores.values()
    assert folder == list_shards == tar_shards == parquet_shards


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_features_lie_where_the_affine_map_says(fit: str, tmp_path: Path) -> None:
    """A bright disc in the original is where the features differ from those of the same image without it."""
    from PIL import Image, ImageDraw

    (tmp_path / "images").mkdir()
    centre = (130, 60)
    for name, disc in (("plain", False), ("disc", True)):
        image = Image.new("RGB", (200, 120), (90, 120, 60))
        if disc:
            ImageDraw.Draw(image).ellipse([centre[0] - 9, centre[1] - 9, centre[0] + 9, centre[1] + 9], "white")
        image.save(tmp_path / "images" / f"{name}.png")
    job = config(tmp_path / "images", tmp_path / "store", layer="1", fit=fit, size="96x128", components=2)
    assert upsample(job) == 0
    store = FeatureStore(job.store)
    difference = np.abs(store.read("disc.png") - store.read("plain.png")).sum(0)
    y, x = np.unravel_index(difference.argmax(), difference.shape)
    a = store.index["affine"][store.row_of("disc.png")].as_py()
    expected = (a[0] * centre[0] + a[2], a[4] * centre[1] + a[5])
    assert np.hypot(x + 0.5 - expected[0], y + 0.5 - expected[1]) < 8
    disc = np.hypot(np.arange(200) + 0.5 - centre[0], np.arange(120)[:, None] + 0.5 - centre[1]) < 10
    mask = store.align(disc, "disc.png")
    rows, columns = np.nonzero(mask)
    assert np.hypot(columns.mean() + 0.5 - expected[0], rows.mean() + 0.5 - expected[1]) < 0.5
    assert difference[mask].mean() > 3 * difference[~mask].mean()
    moved = store.align(np.roll(disc, -60, axis=1), "disc.png")
    assert difference[moved].mean() < 0.5 * difference[mask].mean()
    y0, x0, y1, x1 = store.index["valid_box"][0].as_py()
    assert (y1 - y0, x1 - x0) == ((77, 128) if fit == "pad" else (96, 128))


def test_a_basis_can_be_shared(photographs: Path, tmp_path: Path) -> None:
    job = config(photographs, tmp_path / "train")
    features = {name: getattr(job, name) for name in FitPcaConfig.__dataclass_fields__ if hasattr(job, name)}
    assert fit_pca(FitPcaConfig(**features, output=str(tmp_path / "basis.npz"))) == 0
    assert upsample(job) == 0
    for name, pca in (("from_file", tmp_path / "basis.npz"), ("from_store", tmp_path / "train")):
        assert upsample(replace(job, store=str(tmp_path / name), pca=str(pca))) == 0
        store = FeatureStore(str(tmp_path / name))
        assert np.array_equal(store.components, FeatureStore(job.store).components)
        assert shard_bytes(tmp_path / name) == shard_bytes(tmp_path / "train")
    with pytest.raises(JobError, match=r"fitted to other features.*layer: stored 2, asked 1"):
        upsample(replace(job, store=str(tmp_path / "other"), layer="1", pca=str(tmp_path / "basis.npz")))
    with pytest.raises(JobError, match="only 8"):
        upsample(replace(job, store=str(tmp_path / "other"), components=9, pca=str(tmp_path / "basis.npz")))


def test_the_documents_snippets_run(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i, path in enumerate(sorted(photographs.rglob("*.png"))[:4]):
        shutil.copyfile(path, folder / ("chelsea.png" if i == 1 else path.name))
    assert upsample(config(folder, tmp_path / "demo" / "store")) == 0
    monkeypatch.chdir(tmp_path)
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    results = []
    for snippet in snippets:
        names: dict[str, Any] = {}
        exec(compile(snippet, "a document's snippet", "exec"), names)
        results.append(names)
    reading, plain_zarr, kernels = results
    for names in (reading, plain_zarr):
        assert names["features"].shape == (8, SIZE, SIZE)
    assert plain_zarr["channels"].shape == (128,)
    assert kernels["stage"].range_temp.grad.isfinite()


def test_icons_between_the_photographs_do_not_hide_them(photographs: Path, tmp_path: Path) -> None:
    """Whatever the period of a dataset: steps come from images that are usable, and from no others."""
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i, file in enumerate(sorted(photographs.rglob("*.png"))):
        shutil.copy(file, images / f"{i:02}_photo.png")
        Image.open(file).resize((4, 4)).save(images / f"{i:02}_icon.png")
    assert upsample(config(images, tmp_path / "store", max_failed_share=0.5)) == 0
    store, alone = FeatureStore(str(tmp_path / "store")), tmp_path / "alone"
    statuses = store.index["status"].to_pylist()
    assert statuses == ["too_small", "ok"] * 14
    assert upsample(config(photographs, alone)) == 0
    assert store.step is not None
    # The same fourteen photographs, so the same steps up to the order of the sums and what that does to the basis.
    np.testing.assert_allclose(store.step, FeatureStore(str(alone)).step, rtol=1e-3)
