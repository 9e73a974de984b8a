"""What a job says of its images before it works, where it refuses, and scanning on a cluster."""

import contextlib
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import JobError
from pipeline.images.listing.source import list_images
from pipeline.run.planning.describe import describe
from pipeline.run.planning.plan import Plan, feature_spec, make_plan
from pipeline.run.planning.sources import cluster_scan_map
from schemas.options import FitPcaConfig, UpsampleConfig
from tests.helpers.datasets import column, tar_info, write_tar
from tests.helpers.photographs import photo


def plan(images: Path, **options: Any) -> Plan:
    defaults: dict[str, Any] = {
        "backbone": "resnet18", "weights": "random", "layer": "2", "size": "64", "components": 8, "workers": 0,
        "device": "cpu", "dry_run": True,
    }  # fmt: skip
    return make_plan(UpsampleConfig(images=str(images), store=f"{images}-store", **{**defaults, **options}))


def test_the_plan_says_what_is_not_used(tmp_path: Path) -> None:
    members = [
        ("a.jpg", photo()),
        ("a.png", b""),
        ("a.cls", b"1"),
        ("b.jpg", photo()),
        ("b.cls", b"x"),
        ("c.heic", b""),
    ]
    path = write_tar(tmp_path / "x.tar", [(tar_info(name), data) for name, data in members])
    with pytest.raises(JobError, match=r"1 of 3 images .33.3%. cannot be used.*--max-failed-share 0.01") as error:
        plan(path)
    assert f"images of an unsupported format (.heic), e.g. c.heic in {path}" in str(error.value)
    made = plan(path, max_failed_share=0.4)
    lines = describe(made).splitlines()
    assert lines[0] == f"images      2 from {path}, 1 with a label"
    assert lines[1].startswith("left out    1 images of an unsupported format (.heic)")
    assert lines[2] == "skipped     1 further images of a sample, of which only one is used, e.g. a.png"
    assert lines[3] == "no label    1 labels that are text, where most are numbers, e.g. x"


def test_links_to_nothing_are_refused_before_the_work(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(photo())
    (tmp_path / "x.jpg").symlink_to("nothing")
    with pytest.raises(
        JobError, match=r"1 of 5 images .*\n  1 files that cannot be accessed, such as broken links, e.g. x.jpg"
    ):
        plan(tmp_path)
    assert plan(tmp_path, max_failed_share=0.2).features.rows == 5


def test_jobs_without_a_share_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1.jpg").write_bytes(photo())
    (tmp_path / "2.heic").write_bytes(b"")
    config = FitPcaConfig(
        images=str(tmp_path), output="x.npz", backbone="resnet18", weights="random", size="64", workers=0
    )
    with caplog.at_level("INFO"):
        feature_spec(config)
    assert "left out    1 images of an unsupported format (.heic), e.g. 2.heic" in caplog.text


def test_scans_go_to_a_cluster_only_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_scan_map() is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_scan_map() is not None


@pytest.mark.s3
def test_tars_are_scanned_as_tasks(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run.ray import cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # a Ray of this process then
    filesystem, path = fsspec.core.url_to_fs(s3_bucket)
    for number in range(3):
        members = [
            (tar_info(f"{number}{name}"), b"dog" if "cls" in name else b"x") for name in ("a.jpg", "a.cls", "b.cr2")
        ]
        tar = write_tar(tmp_path / f"{number}.tar", members)
        filesystem.pipe_file(f"{path}/{number}.tar", tar.read_bytes())
    here = list_images(s3_bucket)
    with cluster.connected():
        monkeypatch.setattr(cluster, "connected", contextlib.nullcontext)  # one start of Ray is enough
        there = list_images(s3_bucket, scan_map=cluster.map_on_cluster)
        filesystem.pipe_file(f"{path}/1.tar", tar.read_bytes()[:700])
        with pytest.raises(JobError, match=r"^Tar s3://.*/1\.tar: truncated or damaged"):
            list_images(s3_bucket, scan_map=cluster.map_on_cluster)
    assert column(there, "key") == ["0a", "1a", "2a"]
    assert there.references.equals(here.references)
    assert (there.class_names, there.findings, there.candidates) == (("dog",), here.findings, 6)
