"""The evaluation job: from photographs and masks to a table, JSON and a page."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.evaluate import evaluate
from pipeline.errors import JobError
from schemas.evaluate_options import UNLABELLED, EvaluateConfig
from tests.helpers.stores import SHARED
from tests.pipeline.evaluate.stores import write_png

ROOT = Path(__file__).parents[3]
WEIGHTS, COCO = SHARED / "weights" / "tf_efficientnet_lite0.safetensors", SHARED / "data" / "coco200"
SMALL = "backbone=resnet18,weights=random,layer=1,size=64,components=8,workers=0,device=cpu"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Photographs of two colours, in folders train and val, and masks of where each colour is."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(6):
            mask = np.kron(rng.integers(1, 3, (4, 6)), np.ones((16, 16))).astype(np.uint8)
            colours = np.array([[0, 0, 0], [200, 60, 40], [30, 90, 210]])[mask] + rng.integers(0, 40, (64, 96, 3))
            (tmp_path / "photos" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "photos" / part / f"{i}.png")
            write_png(tmp_path / "masks" / part / f"{i}.png", mask)
    return tmp_path


def test_from_photographs_to_a_report(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EvaluateConfig(
        task="segmentation",
        features=(f"name=bilinear,{SMALL},upsampler=bilinear", f"name=jbu,{SMALL},upsampler=jbu"),
        images=str(dataset / "photos"),
        labels=str(dataset / "masks"),
        report=str(dataset / "report"),
        runs=2,
        pixels=2000,
        shown=2,
    )  # fmt: skip
    assert evaluate(config) == 0
    printed = capsys.readouterr().out
    document = json.loads((dataset / "report" / "report.json").read_text())
    of_sides = document["figures"]["mean IoU"]["sides"]
    assert of_sides["jbu"]["value"]["mean"] > 0.5
    assert f"{of_sides['jbu']['value']['mean']:.3f} ±" in printed
    assert of_sides["bilinear"]["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert document["baseline"] == "bilinear"
    assert document["options"]["runs"] == 2
    assert [unit["name"] for unit in document["units"]] == [f"val/{i}.png" for i in range(6)]
    assert [side["name"] for side in document["sides"]] == ["bilinear", "jbu"]
    assert "note: the intervals resample 6 images" in printed
    page = (dataset / "report" / "report.html").read_text()
    assert page.count("<img") == 3 * 2 * 4  # sections × images × (photograph, labels, sides)
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere


def test_a_report_that_cannot_be_written_is_said_before_the_work(dataset: Path) -> None:
    config = EvaluateConfig(task="segmentation", features=("no/store",), labels="x", report="/proc/report")
    with pytest.raises(JobError, match="--report /proc/report"):
        evaluate(config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": None}, "--task segmentation needs labels: pass --labels"),
        ({"features": ()}, "--features: got none"),
        ({"train": "a/*"}, "--train and --val are patterns of keys: pass both or neither"),
        ({"runs": 0}, "--runs must be at least 1: got 0"),
        ({"task": "reconstruction"}, "--task reconstruction uses no labels: leave out --labels"),
        ({"task": "discovery", "train": "a/*", "val": "b/*"}, "--task discovery trains nothing: leave out --train"),
        ({"depth_range": (3.0, 1.0)}, "--depth-range is a range in metres: got 3.0 1.0"),
        ({"depth_range": (0.1, math.inf)}, "--depth-range must be a finite number: got inf"),
        ({"depth_range": (math.nan, 1.0)}, "--depth-range must be a finite number: got nan"),
        ({"depth_scale": math.nan}, "--depth-scale must be positive and finite: got nan"),
        ({"depth_scale": 0.0}, "--depth-scale must be positive and finite: got 0.0"),
        ({"alphas": (0.1, math.inf)}, "--alphas must be positive and finite: got inf"),
        ({"alphas": ()}, "--alphas: got none"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 10**20}, r"--seed must be at least 0 and less than 2\^63: got 1"),
        ({"limit": 0}, "--limit must be at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(**{"task": "segmentation", "features": ("a",), "labels": "m", "report": "r", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "nothing"}, "--labels: .*nothing has no files: expected masks named by key"),
        ({"labels": "masks/val"}, r"none of the 6 training images has labels: .* such as train/0.png.png"),
        ({"task": "discovery", "labels": "masks/val"}, "none of the 12 images has labels"),
        ({"task": "video", "labels": "masks/val"}, "none of the 2 sequences has labels"),
        (
            {"train": "trian/*", "val": "val/*"},
            r"no image is left to train on, of 12 images \(--train trian.*; keys look like 'train/0.png'",
        ),
        ({"task": "depth", "train": "train/*", "val": "*"}, "--train train/.* and --val .* have 6 images in common"),
        (
            {"task": "keypoints", "labels": "points.json"},
            "no image with features has keypoints: keys look like '0.png",
        ),
        ({"task": "keypoints", "labels": "apart.json"}, "every image is alone in its folder: pass --no-same-folder"),
        ({"task": "keypoints", "labels": "apart.json", "limit": 1}, "no two of 1 image .*; --limit leaves one"),
        ({"task": "video", "images": "few"}, r"no folder has 3 frames or more, .*; clip/ has 2, such as clip/0.png"),
        ({"task": "depth", "labels": "masks"}, "--labels .*masks has integer depths: pass --depth-scale"),
        ({"task": "keypoints"}, r"--labels .*masks: expected a JSON object"),
        ({"task": "activation_maps"}, "--features a: expected class scores: make the features with --space head"),
    ],
)
def test_a_request_is_checked_before_the_work(dataset: Path, options: dict[str, Any], words: str) -> None:
    task = options.get("task", "segmentation")
    (dataset / "points.json").write_text('{"0.png": [[1, 2]]}')
    (dataset / "apart.json").write_text('{"train/0.png": [[1, 2]], "val/0.png": [[1, 2]]}')
    shutil.copytree(dataset / "photos" / "val", dataset / "few" / "clip")
    for i in range(2, 6):
        (dataset / "few" / "clip" / f"{i}.png").unlink()
    config = EvaluateConfig(
        task=task,
        features=(f"name=a,{SMALL}",),
        images=str(dataset / options.get("images", "photos")),
        stores=str(dataset / "stores"),
        limit=options.get("limit"),
        labels=None if task in UNLABELLED else str(dataset / options.get("labels", "masks")),
        train=options.get("train"),
        val=options.get("val"),
        report=str(dataset / "report"),
    )
    with pytest.raises(JobError, match=words):
        evaluate(config)
    assert not (dataset / "stores").exists()


def test_names_that_are_no_text(dataset: Path) -> None:
    """Bytes of a path that are not UTF-8 are in the report as escapes, and so is what the job prints."""
    command = [
        sys.executable, "-m", "jobs.evaluate", "--task", "segmentation", "--images", str(dataset / "photos"),
        "--labels", str(dataset / "masks"), "--report", str(dataset / "report"), "--runs", "1", "--pixels", "500",
        "--features", f"name=caf\udce9,{SMALL},upsampler=bilinear",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"caf\\udce9" in done.stdout
    assert json.loads((dataset / "report" / "report.json").read_text())["baseline"] == "caf\udce9"
    assert "caf\\udce9" in (dataset / "report" / "report.html").read_text()


@pytest.mark.s3
def test_stores_labels_and_report_in_object_storage(dataset: Path, s3_bucket: str) -> None:
    import s3fs

    s3 = s3fs.S3FileSystem(skip_instance_cache=True)
    s3.put(str(dataset / "masks"), f"{s3_bucket}/masks", recursive=True)
    config = EvaluateConfig(
        task="segmentation",
        features=(f"name=jbu,{SMALL},upsampler=jbu",),
        images=str(dataset / "photos"),
        stores=f"{s3_bucket}/stores",
        labels=f"{s3_bucket}/masks",
        report=f"{s3_bucket}/report",
        runs=1,
        pixels=500,
        shown=1,
    )
    assert evaluate(config) == 0
    document = json.loads(s3.cat(f"{s3_bucket}/report/report.json"))
    assert document["figures"]["mean IoU"]["sides"]["jbu"]["value"]["mean"] > 0.5
    assert document["sides"][0]["store"].startswith(f"{s3_bucket}/stores/")
    assert b"<img" in s3.cat(f"{s3_bucket}/report/report.html")


@pytest.mark.skipif(not (WEIGHTS.exists() and COCO.exists()), reason=f"needs weights and photographs in {SHARED}")
def test_on_photographs_trained_weights_beat_random_ones(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
        for photo in sorted((COCO / "images" / part).glob("*.jpg"))[:12]:
            (tmp_path / "images" / part / photo.name).symlink_to(photo.resolve())
    lite0 = "backbone=tf_efficientnet_lite0,workers=0,device=cpu,components=32,upsampler=bilinear"
    config = EvaluateConfig(
        task="segmentation",
        features=(f"name=trained,{lite0},weights={WEIGHTS}", f"name=random,{lite0},weights=random"),
        images=str(tmp_path / "images"),
        labels=str(COCO / "masks"),
        report=str(tmp_path / "report"),
        ignore=(0, 255),
        classes=6,
        runs=2,
        pixels=6000,
        shown=1,
    )
    assert evaluate(config) == 0
    accuracy = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]["accuracy"]["sides"]
    assert accuracy["trained"]["value"]["mean"] > 0.5
    assert accuracy["random"]["difference"]["high"] < 0
