"""The main job with ``--represent compact``: readers take the last step, and get the features of a dense store."""

import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from PIL import Image
from safetensors.torch import save_file

from densefeat import FeatureStore, MissingFeatures, StoreError, layout
from densefeat.storage.guidance import decode_guidance
from densefeat.torch import LastStep
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from kernels.jbu import JBUStack
from pipeline.errors import JobError
from pipeline.evaluate.data.originals import stored_geometry
from pipeline.images.decoding.decode import decode
from pipeline.upsamplers.anyup.network import AnyUp
from schemas.options import UpsampleConfig
from tests.helpers.photographs import photo
from tests.helpers.upsample_jobs import config, shard_bytes

ROOT = Path(__file__).parents[3]
FAILED = ("80grey.png", "90broken.jpg")  # no failure but for multiview, and a failure for all


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten smooth pictures of several shapes, one of one colour and one broken."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(10):
        blocks = rng.integers(0, 256, (5 + i % 3, 6, 3), np.uint8)
        Image.fromarray(blocks).resize((110 - 3 * i, 90), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    Image.new("RGB", (90, 90), (9, 99, 199)).save(folder / FAILED[0])
    (folder / FAILED[1]).write_bytes(photo()[:300])
    return folder


def job(images: Path, store: Path, **options: Any) -> UpsampleConfig:
    return config(images, store, represent="compact", max_failed_share=0.5, **options)


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> UpsampleConfig:
    options = job(pictures, tmp_path_factory.mktemp("made") / "store")
    assert upsample(options) == 0
    return options


@pytest.mark.parametrize(
    "options",
    [
        {"upsampler": "jbu"},
        {"upsampler": "jbu", "jbu_kernels": "wide"},
        {"upsampler": "jbu", "dtype": "float16", "size": "64x96", "fit": "pad", "output_size": "50x70"},
        {"upsampler": "bilinear", "fit": "squash", "output_size": "33"},
        {"upsampler": "multiview", "views": 3, "size": "64x48", "output_size": "64x48"},
        {"upsampler": "multiview", "views": 3, "jbu_kernels": "wide"},
    ],
    ids=lambda options: options["upsampler"] + options.get("dtype", options.get("jbu_kernels", "")),
)
def test_it_reads_like_a_dense_store(pictures: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    floor = {} if options.get("dtype") == "float16" else {"error_floor": 0.01}
    compact = job(pictures, tmp_path / "compact", **floor, **options)
    dense = replace(compact, store=str(tmp_path / "dense"), represent="dense", dtype="float16", error_floor=None)
    assert upsample(compact) == upsample(dense) == 0
    assert verify(VerifyConfig(store=compact.store)) == 0
    got, expected = FeatureStore(compact.store), FeatureStore(dense.store)
    assert got.shape == expected.shape
    assert got.index["status"].equals(expected.index["status"])
    assert got.index["affine"].equals(expected.index["affine"])
    for row in got.rows_with_features.tolist():
        a, b = got.read(row), expected.read(row)
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)
        points = np.random.default_rng(row).uniform(0, 30, (5, 2))
        assert np.allclose(got.sample(row, points), _sampled(a, points), atol=1e-4 * np.abs(a).max())
    height = got.shape[1]
    assert np.array_equal(got.read(1, box=(3, 4, height, 9)), got.read(1)[:, 3:, 4:9])
    with pytest.raises(MissingFeatures):
        got.read(FAILED[1])


def _sampled(features: np.ndarray, points: np.ndarray) -> np.ndarray:
    grid = torch.from_numpy(points * 2 / np.array(features.shape[:0:-1]) - 1).float()[None, None]
    kept = torch.nn.functional.grid_sample(
        torch.from_numpy(features)[None], grid, align_corners=False, padding_mode="border"
    )
    return np.asarray(kept[0, :, 0].T)


def test_it_is_small_and_is_described(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    assert store.layout.image_shape == (8, 8, 8)
    assert store.shape == (8, 64, 64)
    assert store.attributes["format_version"] == 2
    assert store.attributes["configuration"]["storage"]["represent"] == "compact"
    assert store.compact == {
        "size": [64, 64],
        "last_step": {"name": "jbu", "radius": 3, "sigma_spatial": 1.5, "sigma_range": 0.1},
        "guidance": [64, 64],
    }
    assert "compact at 8×8" in repr(store)


def test_the_guidance_is_the_image_of_the_backbone(made: UpsampleConfig, pictures: Path) -> None:
    store = FeatureStore(made.store)
    pixels = decode((pictures / "03.png").read_bytes(), stored_geometry(store)).pixels.transpose(1, 2, 0)
    guidance = store.read_guidance("03.png")
    assert guidance.shape == pixels.shape
    assert np.abs(guidance.astype(int) - pixels).mean() < 3
    with pytest.raises(MissingFeatures):
        store.read_guidance(FAILED[1])


def test_a_training_job_takes_the_step_in_batches(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    rows = [1, 5, 7]
    assert store.compact is not None
    assert store.step is not None
    codes = torch.from_numpy(np.stack([store.read_codes(row) for row in rows]))
    guidance = torch.from_numpy(np.stack([store.read_guidance(row) for row in rows])).permute(0, 3, 1, 2)
    step = LastStep.of(store.compact)
    features = step(codes * torch.from_numpy(store.step)[:, None, None], guidance)
    assert np.allclose(features.numpy(), store.read(rows), atol=1e-5)


def test_zarr_and_xarray_open_it_without_the_image_codec(made: UpsampleConfig) -> None:
    store = FeatureStore(made.store)
    group = zarr.open_group(made.store, mode="r")
    assert np.array_equal(group["features"][3], store.read_codes(3))
    assert xarray.open_zarr(made.store).features.shape == (12, 8, 8, 8)


def test_the_guidance_array_is_as_its_metadata_say(made: UpsampleConfig) -> None:
    """Read with nothing but the Zarr specification: shards with an index at the start, chunks of JPEG and crc32c."""
    folder = Path(made.store) / "guidance"
    metadata = json.loads((folder / "zarr.json").read_text())
    assert metadata["shape"] == [12, 64, 64, 3]
    (sharding,) = metadata["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["imagecodecs_jpeg", "crc32c"]
    assert sharding["configuration"]["index_location"] == "start"
    rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    data = (folder / "c" / "1" / "0" / "0" / "0").read_bytes()
    index = np.frombuffer(data[: 16 * rows], "<u8").reshape(rows, 2)
    for row in range(rows):
        start, nbytes = map(int, index[row])
        image = Image.open(io.BytesIO(data[start : start + nbytes - 4]))
        assert np.array_equal(np.asarray(image), FeatureStore(made.store).read_guidance(rows + row))


def test_stock_zarr_reads_the_shards_of_the_guidance(made: UpsampleConfig, tmp_path: Path) -> None:
    """With the image codec replaced by zarr's own bytes, on the images decoded: the layout of the shards is right."""
    folder = Path(made.store) / "guidance"
    metadata = json.loads((folder / "zarr.json").read_text())
    metadata["codecs"][0]["configuration"]["codecs"] = [
        {"name": "bytes"}, {"name": "crc32c"}
    ]  # fmt: skip
    shutil.copytree(folder, tmp_path / "guidance")
    (tmp_path / "guidance" / "zarr.json").write_text(json.dumps(metadata))
    store = FeatureStore(made.store)
    for shard in (0, 1, 2):
        key = f"c/{shard}/0/0/0"
        places = layout.unpack_shard_index((folder / key).read_bytes(), 4, index_first=True)
        data = (folder / key).read_bytes()
        raw = [
            None if place is None else layout.with_crc(decode_guidance(data[place[0] : sum(place)]).tobytes())
            for place in places
        ]
        (tmp_path / "guidance" / key).write_bytes(layout.pack_shard(raw, 4, index_first=True)[0])
    array = zarr.open_array(str(tmp_path / "guidance"), mode="r")
    assert np.array_equal(array[5], store.read_guidance(5))
    assert not array[11].any()  # the broken one


@pytest.mark.parametrize(
    ("upsampler", "network"), [("implicit", None), ("anyup", lambda: AnyUp()), ("jbu", lambda: JBUStack(128))]
)
def test_steps_that_readers_cannot_take_are_refused(
    pictures: Path, tmp_path: Path, upsampler: str, network: Callable[[], torch.nn.Module] | None
) -> None:
    weights = None
    if network is not None:
        weights = str(tmp_path / "weights.safetensors")
        save_file(network().state_dict(), weights)
    with pytest.raises(JobError, match=rf"--represent compact: readers cannot take the last step of .*{upsampler}"):
        upsample(job(pictures, tmp_path / "store", upsampler=upsampler, upsampler_weights=weights))
    assert not (tmp_path / "store").exists()


def test_a_resume_needs_no_option_and_refuses_the_other_kind(made: UpsampleConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    for path in (store / "manifest.parquet", store / "_ledger/000001.parquet", store / layout.shard_key(1)):
        path.unlink()
    (store / layout.shard_key(1, layout.GUIDANCE)).unlink()
    resumed = replace(made, store=str(store), resume=True, represent=None)
    assert upsample(resumed) == 0
    assert shard_bytes(store, "guidance") == shard_bytes(Path(made.store), "guidance")
    with pytest.raises(JobError, match=r'storage.represent: stored "compact", asked null'):
        upsample(replace(resumed, represent="dense"))


def test_a_lost_or_cut_guidance_object_is_made_again(made: UpsampleConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    path = store / layout.shard_key(2, layout.GUIDANCE)
    path.write_bytes(path.read_bytes()[:-1])
    (store / layout.shard_key(0, layout.GUIDANCE)).unlink()
    assert upsample(replace(made, store=str(store), resume=True)) == 0
    assert shard_bytes(store, "guidance") == shard_bytes(Path(made.store), "guidance")


def test_damaged_guidance_is_found_never_used_and_repaired(
    made: UpsampleConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    path = store / layout.shard_key(1, layout.GUIDANCE)
    whole = path.read_bytes()
    for place, words in ((16 * 4 + 4 + 50, "row 4 .*guidance image does not match"), (3, "shard index does not match")):
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(StoreError, match=words):
            FeatureStore(str(store)).read(4)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        assert verify(VerifyConfig(store=str(store))) == 1
    assert "shard 1" in caplog.text
    assert "its object of the array guidance's bytes changed" in caplog.text
    assert verify(VerifyConfig(store=str(store), repair=True)) == 1
    assert upsample(replace(made, store=str(store), resume=True)) == 0
    assert shard_bytes(store, "guidance") == shard_bytes(Path(made.store), "guidance")


def test_overwrite_leaves_no_guidance(made: UpsampleConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    assert upsample(replace(made, store=str(store), overwrite=True, represent="dense")) == 0
    assert not [path for path in (store / "guidance").rglob("*") if path.is_file()]
    assert FeatureStore(str(store)).compact is None


@pytest.mark.parametrize("damage", [None, {}, {"size": [64]}, {"size": [64, 64], "last_step": {"name": "magic"}}])
def test_a_damaged_description_is_an_error(made: UpsampleConfig, tmp_path: Path, damage: Any) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["densefeat"]["compact"] = damage
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match=r"the attribute compact|'magic' is unknown to this version"):
        FeatureStore(str(store)).read(0)


@pytest.mark.parametrize("package", ["torch", "PIL"])
def test_without_a_package_the_extra_is_named(made: UpsampleConfig, package: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"  # as if not installed
        "from densefeat import FeatureStore, MissingPackage\n"
        f"store = FeatureStore({made.store!r}); print(store.read_codes(0).shape)\n"
        "try: store.read(0)\n"
        "except MissingPackage as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(8, 8, 8)")
    assert "pip install 'densefeat[compact]'" in done.stdout
