import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import JobError
from pipeline.features.checkpoints import read_metadata, read_state_dict
from pipeline.features.provenance import Provenance, check_pairing

IDENTITY = {"name": "resnet18", "layer": 2, "weights": "0a1b"}


def backbone(**changed: Any) -> Any:
    return SimpleNamespace(identity=lambda: {**IDENTITY, **changed}, reduction=8)


def saved(path: Path, metadata: dict[str, str]) -> str:
    save_file({"a": torch.zeros(1)}, path / "weights.safetensors", metadata)
    return str(path / "weights.safetensors")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    known = Provenance("lift", (IDENTITY,), {"patch": "8", "steps": "5"})
    uri = saved(tmp_path, known.to_metadata())
    assert Provenance.from_metadata(read_metadata(uri), uri) == known
    check_pairing(uri, "lift", backbone())


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    known = Provenance("lift", (IDENTITY,), {name: f"{name}…" for name in "cab"})
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(3)}
    files = {known.safetensors(tensors) for _ in range(20)}
    assert len(files) == 1
    path = tmp_path / "weights.safetensors"
    path.write_bytes(files.pop())
    assert Provenance.from_metadata(read_metadata(str(path)), str(path)) == known
    state = read_state_dict(str(path))
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_files_of_before_are_read(tmp_path: Path) -> None:
    """As jobs/train_upsampler.py has always written them."""
    before = {"format": "densefeat-upsampler-1", "upsampler": "lift", "patch": "8", "backbones": json.dumps([IDENTITY])}
    uri = saved(tmp_path, before)
    assert Provenance("lift", (IDENTITY,), {"patch": "8"}).to_metadata() == before
    check_pairing(uri, "lift", backbone())
    with pytest.raises(JobError, match=r"for resnet18 at layer 2 .*layer: weights 2, asked 1"):
        check_pairing(uri, "lift", backbone(layer=1))
    with pytest.raises(JobError, match="for the upsampler lift, but this job uses jbu: pass --upsampler lift"):
        check_pairing(uri, "jbu", backbone())


def test_weights_for_every_backbone_and_those_of_others_pass(tmp_path: Path) -> None:
    other = backbone(layer=1)
    check_pairing(saved(tmp_path, Provenance("jbu", (IDENTITY,), {"final": "off"}).to_metadata()), "jbu", other)
    check_pairing(saved(tmp_path, Provenance("jbu", ()).to_metadata()), "jbu", other)
    assert Provenance.from_metadata({"upsampler": "lift", "backbones": "anything"}, "theirs") is None
    check_pairing(saved(tmp_path, {"upsampler": "lift", "backbones": "anything"}), "jbu", other)


@pytest.mark.parametrize("document", ["{}", "no JSON", "[]", '{"format": 2}', '{"format": 1, "origin": {}}'])
def test_damaged_pooling_models_of_before_are_named(document: str) -> None:
    with pytest.raises(JobError, match=r"weights there: cannot read the metadata .* damaged or of another version"):
        Provenance.from_metadata({"densefeat": document}, "there")
