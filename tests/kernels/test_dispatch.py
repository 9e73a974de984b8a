"""Which implementation runs, who may ask for another, and what is said where it cannot."""

import pytest
import torch

from kernels import dispatch, multiview
from kernels.dispatch import IMPLEMENTATIONS, SWITCH, Kind, kind
from kernels.jbu import adaptive_conv_upsample2x, bilateral_kernel, explain
from kernels.window.attention import windowed_attention
from kernels.window.neighborhood import neighborhood_attention
from kernels.window.sum import window_sum
from tests.helpers.jbu import CUDA

CPU32 = Kind(torch.device("cpu"), torch.float32)


def test_float32_runs_compiled():
    choice = explain(CPU32, CPU32)
    assert choice.chosen == "cpu"
    assert choice.reasons_not["cpu"] == choice.reasons_not["reference"] == []
    assert str(choice).startswith("cpu")


def test_all_reasons_are_given():
    choice = explain(Kind(torch.device("meta"), torch.int32), CPU32)
    assert choice.chosen == "reference"
    text = "; ".join(choice.reasons_not["cpu"])
    assert len(choice.reasons_not["cpu"]) == 2
    assert all(word in text for word in ("meta", "int32"))
    assert "not cpu: " in str(choice)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_on_a_gpu_triton_runs():
    choice = explain(Kind(torch.device("cuda", 0), torch.float16))
    assert choice.chosen == "triton"
    assert "cuda" in "; ".join(choice.reasons_not["cpu"])
    assert explain(Kind(torch.device("cuda", 0), torch.float16), radius=8).chosen == "reference"


def test_forcing_an_implementation_that_cannot():
    source, kernel = torch.zeros(1, 1, 4, 4, device="meta"), torch.zeros(1, 9, 8, 8, device="meta")
    with pytest.raises(ValueError, match=r"'cpu' cannot take these inputs: .*meta"):
        adaptive_conv_upsample2x(source, kernel, implementation="cpu")


def test_an_implementation_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS["jbu"], "absent", "kernels.not_there")
    guidance = torch.rand(1, 3, 8, 8)
    assert explain(kind(guidance)).reasons_not["absent"] == [
        "it cannot be imported: ModuleNotFoundError: No module named 'kernels.not_there'"
    ]
    with pytest.raises(ValueError, match=r"cannot be imported.*not_there"):
        bilateral_kernel(guidance, 1.0, 0.1, implementation="absent")


# --- Every family ---


def ran(monkeypatch, family):
    """The names of the implementations that run, as they do."""
    names, load = [], dispatch.implementation

    def noted(of, name):
        if of == family:
            names.append(name)
        return load(of, name)

    monkeypatch.setattr(dispatch, "implementation", noted)
    return names


def run(family, dtype=torch.float32, **arguments):
    """An operation of a family, and what it makes."""
    torch.manual_seed(0)
    if family == "jbu":
        return adaptive_conv_upsample2x(torch.rand(1, 2, 3, 4).to(dtype), torch.rand(1, 9, 6, 8).to(dtype), **arguments)
    if family == "window_sum":
        maps, rows = torch.rand(1, 3, 3, 2).to(dtype), torch.tensor([0, 1])
        return window_sum(maps, torch.rand(1, 2, 2, 2).to(dtype), rows, rows, **arguments)
    if family == "window_attention":
        queries, keys = torch.rand(1, 4, 6, 2, 3).to(dtype), torch.rand(1, 2, 3, 2, 3).to(dtype)
        return windowed_attention(queries, keys, torch.rand(1, 5, 2, 3).to(dtype), 0.3, **arguments)
    if family == "neighborhood_attention":
        queries, keys = torch.rand(1, 4, 6, 2, 3).to(dtype), torch.rand(1, 2, 3, 2, 3).to(dtype)
        return neighborhood_attention(queries, keys, torch.rand(1, 4, 2, 3).to(dtype), **arguments)
    halved = torch.eye(4, dtype=dtype).repeat_interleave(2, 1)[None] / 2
    targets, start = torch.rand(1, 1, 2, 4, 4).to(dtype), torch.zeros(1, 2, 8, 8, dtype=dtype)
    views, options = multiview.ViewMatrices(halved, halved), {"regularisation": 0.1, "iterations": 3}
    return multiview.solve(targets, views, torch.rand(1, 3, 8, 8), start, **options, **arguments).features


FAST = {
    "jbu": "cpu",
    "multiview": "cpu",
    "neighborhood_attention": "cpu",
    "window_attention": "tiled",
    "window_sum": "cpu",
}


def test_every_family_is_run_here():
    assert set(FAST) == set(IMPLEMENTATIONS)
    assert all("reference" in names for names in IMPLEMENTATIONS.values())


@pytest.mark.parametrize("family", FAST)
def test_the_first_that_can_runs(monkeypatch, family):
    names = ran(monkeypatch, family)
    fast = run(family)
    torch.testing.assert_close(fast, run(family, implementation="reference"))
    if family != "jbu":  # whose reference is called without a look into the table
        assert names == [FAST[family], "reference"]
    assert dispatch.choose(family, None, torch.zeros(1)) == FAST[family]


@pytest.mark.parametrize(("family", "other"), [("multiview", "batched"), ("window_sum", "reference")])
def test_another_runs_where_the_first_cannot(monkeypatch, family, other):
    names = ran(monkeypatch, family)
    run(family, torch.float64)
    assert names == [other]
    with pytest.raises(ValueError, match=r"implementation: 'cpu' cannot take these inputs: it takes torch\.float32, "):
        run(family, torch.float64, implementation="cpu")


@pytest.mark.parametrize("family", FAST)
def test_an_unknown_implementation(family):
    names = ", ".join(IMPLEMENTATIONS[family])
    with pytest.raises(ValueError, match=f"implementation: got 'gpu', need one of {names}, or None"):
        run(family, implementation="gpu")


def test_multiview_says_why():
    assert str(multiview.explain(CPU32)) == "cpu"
    choice = multiview.explain(Kind(torch.device("meta"), torch.float64))
    assert choice.chosen == "batched"
    assert len(choice.reasons_not["cpu"]) == 2


# --- A person's choice ---


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("value", ["reference", "FAMILY=reference", " FAMILY = reference ,", "jbu=cpu,reference"])
def test_the_switch_is_followed(monkeypatch, family, value):
    fast, reference = run(family), run(family, implementation="reference")
    value = value.replace("FAMILY", family)
    monkeypatch.setenv(SWITCH, value)
    assert dispatch.choose(family, None, torch.zeros(1)) == "reference"
    assert torch.equal(run(family), reference)
    assert torch.equal(run(family, implementation=FAST[family]), fast)  # a caller's choice goes before it
    choice = dispatch.explain(family, CPU32)
    assert choice.chosen == "reference"
    assert f"selected by {SWITCH}={value}" in str(choice)


def test_the_switch_of_one_family_leaves_the_others(monkeypatch):
    def chosen():
        return {family: dispatch.choose(family, None, torch.zeros(1)) for family in FAST}

    monkeypatch.setenv(SWITCH, "reference,window_sum=cpu")
    assert chosen() == dict.fromkeys(FAST, "reference") | {"window_sum": "cpu"}
    monkeypatch.setenv(SWITCH, "window_sum=reference")
    assert chosen() == FAST | {"window_sum": "reference"}
    monkeypatch.setenv(SWITCH, "")
    assert chosen() == FAST


@pytest.mark.parametrize("value", ["triton", "cpu", "fast", "jbu=fast", "upsampling=reference", "jbu=", "=reference"])
@pytest.mark.parametrize("family", FAST)
def test_a_switch_to_what_there_is_not(monkeypatch, family, value):
    monkeypatch.setenv(SWITCH, value)
    message = f"{SWITCH}: got '{value}', need an implementation that all families have, or family=name. jbu: cpu"
    for call in (lambda: run(family), lambda: dispatch.explain(family, CPU32)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at its first use
def test_a_switch_to_what_cannot_take_the_inputs(monkeypatch):
    monkeypatch.setenv(SWITCH, "jbu=cpu,window_sum=cpu")
    message = f"{SWITCH}=jbu=cpu,window_sum=cpu: 'cpu' cannot take these inputs: it takes torch.float32, inputs are"
    with pytest.raises(ValueError, match=message):
        run("window_sum", torch.float64)
    with pytest.raises(ValueError, match="'cpu' cannot take these inputs: it runs on the CPU, inputs are on meta"):
        explain(Kind(torch.device("meta"), torch.float32))
    source, kernel = torch.rand(1, 2, 3, 4), torch.rand(1, 9, 6, 8)
    with pytest.raises(ValueError, match="it has no forward-mode derivatives"):
        torch.func.jvp(lambda s: adaptive_conv_upsample2x(s, kernel), (source,), (source,))


def test_the_switch_within_torch_compile(monkeypatch):
    source, kernel = torch.rand(1, 2, 3, 4), torch.rand(1, 9, 6, 8)
    expected = adaptive_conv_upsample2x(source, kernel, implementation="reference")
    monkeypatch.setenv(SWITCH, "jbu=reference")
    compiled = torch.compile(lambda s: adaptive_conv_upsample2x(s, kernel), fullgraph=True, backend="eager")
    assert torch.equal(compiled(source), expected)
