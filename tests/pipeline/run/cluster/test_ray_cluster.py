"""``ray_cluster.yaml`` against what ``ray up`` checks, what AWS's part of Ray makes of it, and the checkout."""

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import tyro
import yaml

from benchmarks import rows
from schemas.options import UpsampleConfig

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / "ray_cluster.yaml").read_text()
CLUSTER = yaml.safe_load(TEXT)
TYPES = CLUSTER["available_node_types"]
COMMANDS = [command for key in CLUSTER if key.endswith("_commands") for command in CLUSTER[key]]


def test_ray_takes_it() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    assert CLUSTER["head_node_type"] in TYPES


def test_the_head_has_no_work() -> None:
    head = TYPES[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    (start,) = (command for command in CLUSTER["head_start_ray_commands"] if "ray start" in command)
    assert "--num-cpus=0" in start.split()


def test_spot_comes_first_and_leaves_room_for_nodes_on_demand() -> None:
    spot, on_demand = TYPES["gpu_spot"], TYPES["gpu_on_demand"]
    node = dict(spot["node_config"])
    assert node.pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert node == on_demand["node_config"]
    assert spot["priority"] > on_demand.get("priority", 0)
    assert spot["max_workers"] < CLUSTER["max_workers"] == on_demand["max_workers"]


def test_nodes_get_what_installing_needs() -> None:
    mounted = {Path(local).name for local in CLUSTER["file_mounts"].values()}
    for local in CLUSTER["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    pyproject = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'(?:readme = |license-files = \[)"([^"]+)"', pyproject)
    assert {"pyproject.toml", "constraints.txt", "densefeat", *needed} <= mounted
    assert any("[job]" in command for command in CLUSTER["setup_commands"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_for_bash(command: str) -> None:
    subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("file", ["ray_cluster.yaml", "README.md", "docs/cluster.md"])
def test_the_command_to_submit_is_one_of_the_job(file: str) -> None:
    text = re.sub(r"^# ?", "", (ROOT / file).read_text(), flags=re.MULTILINE)
    command = re.search(r"ray job submit .*?-- python jobs/upsample_imagenet\.py ((?:.*\\\n)*.*)", text)
    assert command is not None
    options = shlex.split(command[1].replace("\\\n", " "))
    workers = options.index("--workers") + 1
    low, high = map(int, options[workers].split(":"))
    assert 1 <= low < high <= CLUSTER["max_workers"]
    config = tyro.cli(UpsampleConfig, args=options)
    assert config.device == "cuda"


def test_its_figures_are_measured() -> None:
    measured = [row for row in rows.read("main_job") if rows.on_gpu(row) and row["images"] == 2000]
    row = measured[-1]
    stages = row["stage_ms_per_image"]
    comment = " ".join(TEXT.replace("#", " ").split())
    assert f"takes {stages['decode'] + stages['encode']:.0f} ms of a core" in comment
    assert f"computed {stages['backbone'] + stages['upsample']:.2f} ms per image" in comment
    assert f"with {row['cores']} cores, {row['images_per_s']:.0f} images/s" in comment


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_prepares_it_for_aws(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a simulated EC2, which knows instance types but neither capacity nor permissions."""
    from ray.autoscaler._private.commands import _bootstrap_config

    monkeypatch.setenv("HOME", str(tmp_path))  # for the SSH key that it makes
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    config = _bootstrap_config(copy.deepcopy(CLUSTER), no_config_cache=True)
    types = config["available_node_types"]
    for name in ("gpu_spot", "gpu_on_demand"):
        assert types[name]["resources"] | {"CPU": 16, "GPU": 1} == types[name]["resources"]
    assert types["head"]["resources"] == {"CPU": 0}
    for name, node_type in types.items():
        for key, value in TYPES[name]["node_config"].items():
            assert node_type["node_config"][key] == value, (name, key)
    # Its defaults would install with a `pip` that the image lacks.
    assert config["head_setup_commands"] == CLUSTER["setup_commands"] + CLUSTER["head_setup_commands"]
    assert config["worker_setup_commands"] == CLUSTER["setup_commands"]
