import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.jbu import JBUStack
from pipeline.errors import JobError
from pipeline.upsample import JBU, UPSAMPLERS, Bilinear, build_upsampler

GOLDEN = Path(__file__).parents[2] / "shared" / "reference" / "featup_jbu_stack.npz"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_close(actual, expected, rtol):
    """Within rtol of the largest expected value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * expected.abs().max().item())


def random_images(B=1, H=224, W=224):
    """Blocks of colour: edges at which the upsampler has something to do."""
    coarse = torch.randint(0, 256, (B, 3, 9, 7)).float()
    return F.interpolate(coarse, (H, W)).to(torch.uint8)


def random_basis(C, k):
    return torch.randn(C), torch.linalg.qr(torch.randn(C, C))[0][:k]


def random_state(C):
    return {name: 0.3 * torch.randn_like(tensor) + 0.1 for name, tensor in JBUStack(C).state_dict().items()}


def saved(path, state):
    torch.save(state, path)
    return str(path)


def learned(C=6):
    stack = JBUStack(C)
    stack.load_state_dict(random_state(C))
    return JBU(stack).eval()


def test_golden_stack():
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    golden = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}
    stack = JBUStack(3)
    stack.load_state_dict({n.removeprefix("state/"): t for n, t in golden.items() if n.startswith("state/")})
    upsampler = JBU(stack).eval()
    with torch.inference_mode():
        output = upsampler.apply_final(upsampler.apply_stages(golden["source"], golden["guidance"]))
    assert_close(output, golden["output"], 1e-4)


@pytest.mark.parametrize(("low", "size"), [((5, 4), (80, 64)), ((4, 4), (56, 61)), ((3, 4), (60, 70))])
@pytest.mark.parametrize("make", [Bilinear, JBU, learned])
def test_projecting_first_equals_projecting_last(make, low, size):
    """The PCA-first algebra, also through the last interpolation."""
    upsampler, images = make(), random_images(2, 75, 64)
    features = torch.randn(2, 6, *low) + 1
    mean, components = random_basis(6, 4)
    with torch.inference_mode():
        # Interpolation mixes no channels: upsampling all of them needs nothing special.
        full = getattr(upsampler, "forward_full", upsampler)(features, images, size)
        expected = torch.einsum("kc,bchw->bkhw", components, full - mean[:, None, None])
        folding = upsampler.fold(mean, components)
        low_components = torch.einsum("bchw,ck->bkhw", features, folding.projection)
        actual = upsampler(low_components, images, size) + folding.offset[:, None, None]
    assert actual.shape == (2, 4, *size)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(("low", "size"), [((16, 16), (224, 224)), ((14, 14), (224, 224)), ((7, 9), (100, 130))])
def test_training_free_keeps_constants_and_follows_edges(low, size):
    upsampler = JBU().eval()
    with torch.inference_mode():
        flat = upsampler(torch.full((1, 2, *low), 3.0), random_images(), size)
        assert torch.allclose(flat, torch.full_like(flat, 3.0), atol=1e-4)
        # A vertical edge in the image, a step two cells wide in the features: the step moves to the edge.
        images = torch.zeros(1, 3, *size, dtype=torch.uint8)
        edge = size[1] // 2
        images[..., edge:] = 255
        step = torch.linspace(-1, 1, low[1]).sign().expand(1, 1, *low).contiguous()
        jbu = upsampler(step, images, size)[0, 0, size[0] // 2]
        bilinear = Bilinear()(step, images, size)[0, 0, size[0] // 2]
    rise = (jbu[edge + 2] - jbu[edge - 3], bilinear[edge + 2] - bilinear[edge - 3])
    assert rise[0] > 2 * rise[1]


def test_a_checkpoint_loads_with_and_without_its_wrapping(tmp_path):
    state = random_state(5)
    wrapped = {f"upsampler.{name}": tensor for name, tensor in state.items()}
    wrapped |= {"model.cls_token": torch.zeros(3), "downsampler.attn.weight": torch.zeros(2)}
    plain = build_upsampler("jbu", saved(tmp_path / "plain.pth", state), 5)
    prefixed = build_upsampler("jbu", saved(tmp_path / "prefixed.pth", {"state_dict": wrapped}), 5)
    assert plain.identity() == prefixed.identity()
    assert json.loads(json.dumps(plain.identity())) == plain.identity()
    changed = build_upsampler("jbu", saved(tmp_path / "changed.pth", random_state(5)), 5)
    assert changed.identity() != plain.identity()
    assert not any(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("up3.range_temp"), "up3.range_temp"),
        (lambda state: state.update({"up5.range_temp": torch.zeros(())}), "up5.range_temp"),
        (lambda state: state.update({"up1.range_proj.0.weight": torch.zeros(32, 4, 1, 1)}), "up1.range_proj.0.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, spoil, words):
    state = random_state(5)
    spoil(state)
    with pytest.raises(JobError, match=re.escape(words)):
        build_upsampler("jbu", saved(tmp_path / "spoiled.pth", state), 5)


def test_a_checkpoint_of_another_backbone_names_both(tmp_path):
    with pytest.raises(JobError, match=r"384 channels, the backbone makes 112"):
        build_upsampler("jbu", saved(tmp_path / "vit.pth", {"fixup_proj.1.weight": torch.zeros(384, 384, 1, 1)}), 112)


def test_unknown_names_and_useless_weights():
    with pytest.raises(JobError, match=r"'jbx'.*Did you mean 'jbu'"):
        build_upsampler("jbx", None, 8)
    with pytest.raises(JobError, match="bilinear"):
        build_upsampler("bilinear", "weights.pth", 8)
    assert set(UPSAMPLERS) == {"bilinear", "jbu"}


def test_bad_arguments_are_named():
    low, images = torch.zeros(1, 4, 5, 5), random_images(1, 80, 80)
    for arguments, words in [
        ((low[0], images, (80, 80)), "low"),
        ((low, images.float(), (80, 80)), "images"),
        ((low, images, (0, 80)), "size"),
    ]:
        with pytest.raises(ValueError, match=words):
            JBU()(*arguments)
    with pytest.raises(ValueError, match="components"):
        JBU().fold(torch.zeros(4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="need the weights' 6"):
        learned(6).fold(torch.zeros(4), torch.zeros(2, 4))
