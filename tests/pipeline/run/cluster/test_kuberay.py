"""``docs/cluster/rayjob.yaml`` and its image: their structure, and the command where the image has the code."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from densefeat import FeatureStore
from schemas.options import UpsampleConfig
from tests.pipeline.run.cluster.ray_clusters import head, job_options

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "docs" / "cluster"
ACCOUNT, JOB = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
# Fields of KubeRay's ray.io/v1 that the manifest has; Kubernetes drops or refuses others.
FIELDS = {
    "job": {"entrypoint": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
            "rayClusterSpec": dict},
    "cluster": {"rayVersion": str, "authOptions": dict, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict,
                "headGroupSpec": dict, "workerGroupSpecs": list},
    "head": {"rayStartParams": dict, "template": dict},
    "workers": {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": dict,
                "template": dict},
}  # fmt: skip


def entrypoint() -> list[str]:
    return shlex.split(JOB["spec"]["entrypoint"])


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def test_it_is_a_rayjob() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert (ACCOUNT["apiVersion"], ACCOUNT["kind"]) == ("v1", "ServiceAccount")
    (workers,) = CLUSTER["workerGroupSpecs"]
    parts = {"job": JOB["spec"], "cluster": CLUSTER, "head": CLUSTER["headGroupSpec"], "workers": workers}
    for name, part in parts.items():
        assert {field: type(value) for field, value in part.items()} == FIELDS[name], name
    for group in (CLUSTER["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # `ray start` options
        assert group["template"]["spec"]["serviceAccountName"] == ACCOUNT["metadata"]["name"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={CLUSTER['rayVersion']}\n" in constraints
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_the_head_has_no_work_and_workers_have_gpus() -> None:
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(CLUSTER["headGroupSpec"])["resources"]["limits"]
    (workers,) = CLUSTER["workerGroupSpecs"]
    limits = container(workers)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert limits == container(workers)["resources"]["requests"]
    assert workers["minReplicas"] == workers["replicas"] == 0 < workers["maxReplicas"]


def test_its_command_is_one_of_the_job() -> None:
    command = entrypoint()
    assert command[:2] == ["python", "jobs/upsample_imagenet.py"]
    workers = command.index("--workers") + 1
    low, high = map(int, command[workers].split(":"))
    assert 1 <= low < high <= CLUSTER["workerGroupSpecs"][0]["maxReplicas"]
    config = tyro.cli(UpsampleConfig, args=command[2:])
    assert config.device == "cuda"
    assert config.resume  # or a second try would be refused


def test_the_image_has_what_the_job_needs() -> None:
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert set(copied) == needed | {f"{name}/" for name in ("densefeat", "jobs", "kernels", "pipeline", "schemas")}
    assert "pip install --no-cache-dir -c constraints.txt '.[job]'" in DOCKERFILE
    assert "PYTHONPATH=/densefeat " in DOCKERFILE
    assert "WORKDIR /densefeat\n" in DOCKERFILE


@pytest.mark.slow
def test_its_command_runs_where_the_code_is_in_the_image(photographs: Path, tmp_path: Path) -> None:
    """Without a working directory of the job: processes start in the image's, and find the code by its PYTHONPATH."""
    options = [*job_options(photographs, tmp_path / "store", "--workers", "1"), "--resume"]
    with head(cwd=ROOT, PYTHONPATH=str(ROOT)) as cluster, cluster.node(1):
        done = cluster.command("job", "submit", "--", *entrypoint()[:2], *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(FeatureStore(tmp_path / "store")) == 12
