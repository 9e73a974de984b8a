"""pipeline/features/checkpoints.py: reading checkpoints safely, loading them strictly, naming their contents."""

import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import JobError
from pipeline.features.checkpoints import load_strict, read_state_dict, state_digest


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.bias": torch.randn(3, generator=generator),
        "temperature": torch.tensor(2.0),
    }


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin", "ckpt", "PTH"])
def test_reads_every_format(tmp_path, state, suffix):
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert_same(read_state_dict(str(path)), state)
    assert_same(read_state_dict(path.as_uri()), state)


def test_reads_the_format_of_torch_before_1_6(tmp_path, state):
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(str(path)), state)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_reads_remote_files_and_leaves_nothing_behind(tmp_path, monkeypatch, state, suffix):
    local = tmp_path / f"weights.{suffix}"
    save_file(state, local) if suffix == "safetensors" else torch.save(state, local)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))  # nor is there a folder for temporary files
    uri = f"memory://test_weights/weights.{suffix}"
    with fsspec.open(uri, "wb") as file:
        file.write(local.read_bytes())
    assert_same(read_state_dict(uri), state)
    assert list(tmp_path.iterdir()) == [local]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"state_dict_ema": s, "state_dict": {n: t + 1 for n, t in s.items()}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{n}": t for n, t in s.items()},
        lambda s: {"model": OrderedDict((f"_orig_mod.module.{n}", t) for n, t in s.items())},
        lambda s: {n: nn.Parameter(t) for n, t in s.items()},
    ],
    ids=["state_dict", "model", "ema-first", "nested", "data-parallel", "compiled", "parameters"],
)
def test_unwraps(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    got = read_state_dict(str(tmp_path / "w.pth"))
    assert_same(got, state)
    assert not any(t.requires_grad for t in got.values())


def test_keeps_a_prefix_that_not_every_name_has(tmp_path):
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pth")
    assert_same(read_state_dict(str(tmp_path / "w.pth")), state)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(JobError, match=r"posix\.system.*none of its code was run"):
        read_state_dict(str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "got an empty dictionary"),
        ([torch.zeros(1)], "got a list"),
        (torch.zeros(1), "got a Tensor"),
        ({"a": torch.zeros(1), "n": 3}, "1 that are not named tensors: 'n': int"),
        ({0: torch.zeros(1)}, "1 that are not named tensors: 0: Tensor"),
        ({"state_dict": {}}, "got an empty dictionary"),
        ({"args": Namespace(lr=1)}, r"argparse\.Namespace"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
    ],
    ids=["empty", "list", "tensor", "number", "unnamed", "empty-inside", "namespace", "module"],
)
def test_refuses_what_is_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(JobError, match=message):
        read_state_dict(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_refuses_truncated_files(tmp_path, kind, kept):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    state = {"a": torch.randn(1000)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(JobError, match="damaged, truncated or of another format"):
        read_state_dict(str(path))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"hello, this is no checkpoint" * 9, pickle.dumps({"a": 1}, protocol=4)])
def test_refuses_other_formats(tmp_path, suffix, content):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(JobError, match="damaged, truncated or of another format"):
        read_state_dict(str(path))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/nowhere/w.pth", "no such file"),
        ("memory://nowhere/w.safetensors", "no such file"),
        ("nosuchscheme://bucket/w.pth", r"unknown protocol nosuchscheme://"),
        ("weights.npz", r"suffix '\.npz', expected one of \.safetensors"),
        ("weights", "suffix ''"),
    ],
)
def test_names_what_cannot_be_opened(uri, message):
    with pytest.raises(JobError, match=message) as caught:
        read_state_dict(uri)
    assert repr(uri) in str(caught.value)


def test_a_directory_is_no_checkpoint(tmp_path):
    (tmp_path / "w.pth").mkdir()
    with pytest.raises(JobError, match="IsADirectoryError"):
        read_state_dict(str(tmp_path / "w.pth"))


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))


def test_load_strict_fills_every_tensor():
    source, target = net(), net()
    load_strict(target, source.state_dict(), what="a into b")
    assert state_digest(target.state_dict()) == state_digest(source.state_dict())


def test_load_strict_casts_float16_to_the_modules_dtype():
    source, target = net().half(), net()
    load_strict(target, source.state_dict(), what="a into b")
    assert target.conv.weight.dtype == torch.float32
    assert torch.equal(target.conv.weight, source.conv.weight.float())


def test_load_strict_does_without_the_batch_counter():
    state = {n: t for n, t in net().state_dict().items() if n != "bn.num_batches_tracked"}
    load_strict(net(), state, what="a into b")


def test_load_strict_lists_every_mismatch_and_changes_nothing():
    target = net()
    before = state_digest(target.state_dict())
    state = net().state_dict()
    del state["bn.weight"]
    state["conv.weight"] = torch.zeros(4, 3, 3, 3)
    state["conv.bias"] = torch.zeros(4, dtype=torch.int64)
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(JobError) as caught:
        load_strict(target, state, what="w.pth into net")
    text = str(caught.value)
    assert "w.pth into net" in text
    assert "conv.weight (got [4, 3, 3, 3] float32, expected [4, 3, 1, 1] float32)" in text
    assert "conv.bias (got [4] int64, expected [4] float32)" in text
    assert "1 missing from the weights: bn.weight" in text
    assert "1 not in the model: head.weight" in text
    assert state_digest(target.state_dict()) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_load_strict_names_what_is_not_finite(value):
    target, state = net(), net().state_dict()
    state["bn.weight"] = torch.tensor([1.0, value, 1.0, 1.0])
    before = state_digest(target.state_dict())
    with pytest.raises(JobError, match=r"1 with NaN or infinity: bn\.weight\."):
        load_strict(target, state, what="a into b")
    assert state_digest(target.state_dict()) == before


def test_load_strict_lists_the_first_few_and_counts_the_rest():
    state = net().state_dict() | {f"extra{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(JobError, match=r"20 not in the model: extra0, .* and 12 more"):
        load_strict(net(), state, what="a into b")


def test_load_strict_ignores_only_what_it_is_told_to():
    state = net().state_dict() | {"head": torch.zeros(1), "head.weight": torch.zeros(1)}
    load_strict(net(), state, what="a into b", ignore_unexpected=["head"])
    with pytest.raises(JobError, match=r"1 not in the model: head_dist\.weight"):
        load_strict(net(), state | {"head_dist.weight": torch.zeros(1)}, what="a", ignore_unexpected=["head"])
    with pytest.raises(JobError, match=r"missing from the weights: conv\.weight"):
        load_strict(net(), {}, what="a into b", ignore_unexpected=["conv"])


def test_digest_is_of_the_contents(tmp_path, state):
    digest = state_digest(state)
    assert len(digest) == 64
    assert state_digest(dict(reversed(state.items()))) == digest
    assert state_digest({n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}) == digest
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    assert state_digest(read_state_dict(str(tmp_path / "w.safetensors"))) == digest
    assert state_digest(read_state_dict(str(tmp_path / "w.pth"))) == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"temperature": torch.tensor(2.0000002)},
        lambda s: s | {"temperature": torch.tensor([2.0])},
        lambda s: s | {"temperature": torch.tensor(2.0).double()},
        lambda s: s | {"a.weight": s["a.weight"].reshape(4, 3)},
        lambda s: s | {"other": torch.zeros(0)},
        lambda s: {n.upper(): t for n, t in s.items()},
    ],
    ids=["value", "rank", "dtype", "shape", "empty-tensor", "names"],
)
def test_digest_sees_every_change(state, change):
    assert state_digest(change(state)) != state_digest(state)


def test_digest_takes_every_dtype():
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
    assert len({state_digest({"a": torch.ones(2, dtype=dtype)}) for dtype in dtypes}) == len(dtypes)


def test_digest_is_stable_across_versions():
    state = {"b": torch.arange(3, dtype=torch.int16), "a": torch.tensor(1.0)}
    assert state_digest(state) == "ecaff82b2cd800b272c30fe9ad09c2af9e4459d689239cbf04677f373372e42f"
