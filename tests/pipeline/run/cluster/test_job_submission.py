"""``ray job submit`` as the README has it, on a cluster of three nodes with a token."""

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from densefeat import FeatureStore
from tests.helpers.killing import wait_for
from tests.helpers.upsample_jobs import shard_bytes
from tests.pipeline.run.cluster.ray_clusters import LocalCluster, head, job_options, link_many

ROOT = Path(__file__).parents[4]
SUBMIT = ["job", "submit", "--working-dir", "."]
JOB = ["--", "python", "jobs/upsample_imagenet.py"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with head(cwd=tmp_path_factory.mktemp("cluster")) as cluster, cluster.node(1), cluster.node(1):
        yield cluster


def ended(cluster: LocalCluster, job: str) -> tuple[str, int]:
    """Status of a job, and the exit code of its driver."""
    said = cluster.command("job", "list").stdout
    found = re.search(rf"submission_id='{job}'.*?status=<JobStatus\.(\w+).*?driver_exit_code=(-?\d+)", said, re.DOTALL)
    assert found is not None, said
    return found[1], int(found[2])


def test_a_job_on_all_nodes(cluster: LocalCluster, photographs: Path, tmp_path: Path) -> None:
    options = job_options(photographs, tmp_path / "store", "--workers", "2")
    done = cluster.command(*SUBMIT, "--submission-id", "done", *JOB, *options, cwd=ROOT)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert ended(cluster, "done") == ("SUCCEEDED", 0)
    assert "12 with features, 0 failed" in said  # of the driver
    assert re.search(r"12/12 images, [\d.]+ images/s, 3/3 shards", said)  # its progress
    here = [sys.executable, "-m", "jobs.upsample_imagenet", *job_options(photographs, tmp_path / "here")]
    subprocess.run([*here, "--workers", "0"], cwd=ROOT, check=True, capture_output=True)
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "here")


def test_a_refused_job_has_failed(cluster: LocalCluster, photographs: Path, tmp_path: Path) -> None:
    options = job_options(photographs, tmp_path / "store", "--workers", "1", "--fit", "stretch")
    refused = cluster.command(*SUBMIT, "--submission-id", "refused", *JOB, *options, cwd=ROOT)
    assert refused.returncode != 0
    assert "stretch" in refused.stdout
    assert ended(cluster, "refused") == ("FAILED", 2)
    assert not (tmp_path / "store").exists()


def test_a_stopped_job_can_be_resumed(cluster: LocalCluster, photographs: Path, tmp_path: Path) -> None:
    many, store = tmp_path / "many", tmp_path / "store"
    link_many(photographs, many)
    options = job_options(many, store, "--workers", "2", "--resume")
    submitted = cluster.command(*SUBMIT, "--no-wait", "--submission-id", "stopped", *JOB, *options, cwd=ROOT)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(lambda: any((store / "_ledger").glob("*.parquet")))
    stopped = cluster.command("job", "stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = cluster.command("job", "logs", "stopped").stdout
    kept = re.search(r"interrupted: ([1-9]\d*) of 90 shards are finished and kept; continue with --resume", log)
    assert kept is not None, log
    resumed = cluster.command(*SUBMIT, *JOB, *options, cwd=ROOT)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(FeatureStore(store)) == 360


def test_without_the_token_nobody_submits(cluster: LocalCluster, tmp_path: Path) -> None:
    stranger = LocalCluster({**cluster.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}, cluster.address)
    refused = stranger.command("job", "submit", "--", "touch", str(tmp_path / "file"))
    assert refused.returncode != 0
    assert "authentication" in refused.stderr
    assert not (tmp_path / "file").exists()
