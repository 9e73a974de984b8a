"""Checkpoint files in object storage are fetched by the driver, and come to the nodes through Ray."""

from pathlib import Path

import pytest
import s3fs
import timm
from safetensors.torch import save

from pipeline.features.checkpoints import at_hand, read_state_dict, remote_files
from pipeline.run.feature_worker import FeatureWorker
from pipeline.run.planning.plan import make_plan
from pipeline.run.ray import choose
from tests.helpers.photographs import write_random_images
from tests.helpers.servers.s3_proxy import S3Proxy
from tests.helpers.upsample_jobs import config

pytestmark = pytest.mark.s3
NAME = "weights/resnet18.safetensors"


@pytest.fixture
def weights(s3_bucket: str) -> str:
    model = timm.create_model("resnet18")
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3_bucket}/{NAME}", save(model.state_dict()))
    return f"{s3_bucket}/{NAME}"


def test_a_file_at_hand_is_not_fetched(weights: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    (tmp_path / "local.safetensors").touch()
    files = remote_files([weights, str(tmp_path / "local.safetensors")])
    assert list(files) == [weights]
    s3_proxy.seen.clear()
    with at_hand(files):
        there = read_state_dict(weights)
    assert s3_proxy.seen == []
    fetched = read_state_dict(weights)
    assert s3_proxy.seen != []
    assert there.keys() == fetched.keys()
    assert all((there[name] == fetched[name]).all() for name in there)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_do_not_fetch_them(weights: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    images = write_random_images(tmp_path / "images", 4)
    plan = make_plan(config(images, tmp_path / "store", weights=weights, workers=2))
    s3_proxy.seen.clear()
    places = {"--weights": weights}
    with (
        choose.connected(),
        choose.ray_workers("cpu", (2, 2), gpu_share=1.0, attempts=1, stall_timeout_s=600, places=places).build(
            plan.spec
        ) as workers,
    ):
        gets = [path for method, path in s3_proxy.seen if method == "GET" and NAME in path]
        assert len(gets) == 1  # the driver's
        parts = [(plan.references.slice(row, 2),) for row in (0, 2)]
        assert sum(part.images for _, part in workers.map(FeatureWorker.moments, parts)) == 4
    assert [path for method, path in s3_proxy.seen if method == "GET" and NAME in path] == gets
