"""``ray_cluster.yaml`` against the schema that ``ray up`` checks it with, and against the checkout."""

import json
import re
from pathlib import Path

import jsonschema
import ray
import yaml

ROOT = Path(__file__).parents[3]
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_takes_it() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    assert CLUSTER["head_node_type"] in CLUSTER["available_node_types"]


def test_nodes_get_what_installing_needs() -> None:
    mounted = {Path(local).name for local in CLUSTER["file_mounts"].values()}
    for local in CLUSTER["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    pyproject = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'(?:readme = |license-files = \[)"([^"]+)"', pyproject)
    assert {"pyproject.toml", "constraints.txt", "densefeat", *needed} <= mounted
    assert any("[job]" in command for command in CLUSTER["setup_commands"])
