import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro

from kernels.jbu import JBUStack, reference
from kernels.quantization import Encoding, Quantization
from pipeline.errors import JobError
from pipeline.upsamplers.anyup.network import AnyUp
from pipeline.upsamplers.anyup.upsampler import AnyUpUpsampler
from pipeline.upsamplers.bilinear import Bilinear
from pipeline.upsamplers.build import UPSAMPLERS, build_upsampler, describe_upsamplers
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.jbu import JBU
from pipeline.upsamplers.lift.network import LiFT
from schemas.options import UpsampleConfig
from schemas.upsamplers import UPSAMPLER_OPTIONS, JBUOptions, LiFTOptions
from tests.helpers.rounding import assert_close

GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "featup_jbu_stack.npz"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


def backbone(num_chs):
    return SimpleNamespace(num_chs=num_chs, reduction=16)


def lift(path, C=6, iterations=2):
    """LiFT with statistics as after training."""
    network = LiFT(C, 16)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running" in name:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    weights = saved(path / "lift.pth", {f"module.{n}": t for n, t in network.state_dict().items()})
    return build_upsampler("lift", weights, backbone(C), LiFTOptions(lift_iterations=iterations))


def anyup(path):
    return build_upsampler("anyup", saved(path / "anyup.pth", AnyUp(16).state_dict()), backbone(6))


def shared_by_backbones():
    """As learned, without the final convolution."""
    state = random_state(6)
    stack = JBUStack(None)
    stack.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fixup_proj")})
    return JBU(stack).eval()


def wide():
    return build_upsampler("jbu", None, backbone(6), JBUOptions(jbu_kernels="wide"))


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
@pytest.mark.parametrize("make", [Bilinear, JBU, wide, learned, shared_by_backbones])
def test_projecting_first_equals_projecting_last(make, low, size):
    """The PCA-first algebra, also through the last interpolation."""
    upsampler, images = make(), random_images(2, 75, 64)
    features = torch.randn(2, 6, *low) + 1
    mean, components = random_basis(6, 4)
    with torch.inference_mode():
        # Interpolation mixes no channels: upsampling all of them needs nothing special.
        full = getattr(upsampler, "forward_full", upsampler)(features, images, size)
        expected = torch.einsum("kc,bchw->bkhw", components, full - mean[:, None, None])
        actual = upsampler.with_basis(mean, components)(features, images, size)
    assert actual.shape == (2, 4, *size)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, 1e-5)


@torch.inference_mode()
def test_projecting_inside_lift_equals_projecting_last(tmp_path):
    upsampler, images, features = lift(tmp_path), random_images(2, 75, 64), torch.randn(2, 6, 5, 4)
    mean, components = random_basis(6, 4)
    full = upsampler.lift(features, imagenet_normalised(images))
    expected = torch.einsum("kc,bchw->bkhw", components, full - mean[:, None, None])
    projected = upsampler.with_basis(mean, components)
    assert_close(projected(features, images, (20, 16)), expected, 1e-5)
    assert projected(features, images, (33, 40)).shape == (2, 4, 33, 40)


@torch.inference_mode()
def test_projecting_values_of_anyup_equals_projecting_last(tmp_path):
    upsampler, images, features = anyup(tmp_path), random_images(2, 75, 64), torch.randn(2, 6, 5, 4)
    mean, components = random_basis(6, 4)
    full = upsampler.anyup(features, features, imagenet_normalised(images), (33, 40))
    expected = torch.einsum("kc,bchw->bkhw", components, full - mean[:, None, None])
    assert_close(upsampler.with_basis(mean, components)(features, images, (33, 40)), expected, 1e-5)


def test_every_upsampler_is_described_and_known_by_its_weights(tmp_path):
    for make in (lift, anyup):
        identity = make(tmp_path).identity()
        assert json.loads(json.dumps(identity)) == identity
        assert identity != make(tmp_path).identity()  # other random weights
    assert lift(tmp_path).identity()["patch"] == 16
    for name in ("bilinear", "jbu", "lift", "anyup"):
        assert f"\n  {name} " in "\n" + describe_upsamplers()


def test_help_and_options_name_the_upsamplers(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(UpsampleConfig, args=["--help"])
    text = capsys.readouterr().out
    for name in UPSAMPLERS:
        assert f'"{name}"' in text
    assert UPSAMPLER_OPTIONS.keys() <= UPSAMPLERS.keys()


@pytest.mark.parametrize("name", ["lift", "anyup"])
def test_weights_of_another_network_are_refused(tmp_path, name):
    weights = saved(tmp_path / "jbu.pth", random_state(5))
    with pytest.raises(JobError, match=f"jbu.pth: (?i:{name}) weights: got nothing for"):
        build_upsampler(name, weights, backbone(5))


def test_lift_of_another_backbone_names_both(tmp_path):
    weights = saved(tmp_path / "lift.pth", LiFT(12, 16).state_dict())
    with pytest.raises(JobError, match="12 channels, the backbone outputs 8"):
        build_upsampler("lift", weights, backbone(8))


@pytest.mark.parametrize(("low", "size"), [((16, 16), (224, 224)), ((14, 14), (224, 224)), ((7, 9), (100, 130))])
@pytest.mark.parametrize("make", [JBU, wide])
def test_training_free_keeps_constants_and_follows_edges(make, low, size):
    upsampler = make().eval()
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


@pytest.mark.parametrize(
    ("make", "low", "size"),
    [
        (JBU, (7, 9), (56, 72)),
        (wide, (7, 9), (56, 72)),
        (wide, (2, 4), (16, 32)),
        (learned, (5, 4), (80, 64)),
        (JBU, (7, 9), (50, 72)),
        (Bilinear, (3, 4), (20, 30)),
    ],
)
@torch.inference_mode()
def test_codes_are_the_quantized_features(make, low, size):
    """Written by the last stage where it ends at the output's size, else after an interpolation."""
    projected, images = make().with_basis(*random_basis(6, 5)), random_images(3, 80, 90)
    features = 2 * torch.randn(3, 6, *low)
    features[1, 2, 1, 3] = torch.nan
    encoding = Encoding(torch.rand(5) / 10 + 0.01)
    codes = projected.encode(features, images, size, encoding).values
    expected = encoding.encode(projected(features, images, size))
    assert expected.not_finite[1] > 0
    for actual, wanted in zip(codes, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("make", "size"), [(JBU, (30, 30)), (JBU, (4, 4)), (learned, (32, 32)), (Bilinear, (32, 32))])
def test_no_codes_where_interpolation_comes_last(make, size):
    upsampler = make()
    assert not upsampler.can_quantize((4, 4), size)
    with pytest.raises(NotImplementedError):
        upsampler.forward_codes(torch.zeros(1, 2, 4, 4), random_images(), size, Quantization(*torch.ones(2, 2)))


def test_what_computes_is_said():
    assert JBU().explain(torch.device("cpu")).startswith("cpu")
    assert Bilinear().explain(torch.device("cpu")) == "plain torch"


def test_a_checkpoint_loads_with_and_without_its_wrapping(tmp_path):
    state = random_state(5)
    wrapped = {f"upsampler.{name}": tensor for name, tensor in state.items()}
    wrapped |= {"model.cls_token": torch.zeros(3), "downsampler.attn.weight": torch.zeros(2)}
    plain = build_upsampler("jbu", saved(tmp_path / "plain.pth", state), backbone(5))
    prefixed = build_upsampler("jbu", saved(tmp_path / "prefixed.pth", {"state_dict": wrapped}), backbone(5))
    assert plain.identity() == prefixed.identity()
    assert json.loads(json.dumps(plain.identity())) == plain.identity()
    changed = build_upsampler("jbu", saved(tmp_path / "changed.pth", random_state(5)), backbone(5))
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
        build_upsampler("jbu", saved(tmp_path / "spoiled.pth", state), backbone(5))


def test_a_checkpoint_of_another_backbone_names_both(tmp_path):
    with pytest.raises(JobError, match=r"384 channels, the backbone outputs 112"):
        build_upsampler(
            "jbu", saved(tmp_path / "vit.pth", {"fixup_proj.1.weight": torch.zeros(384, 384, 1, 1)}), backbone(112)
        )


def test_unknown_names_and_useless_weights():
    with pytest.raises(JobError, match=r"(?s)'jbx'.*Did you mean 'jbu'.*anyup +weights required"):
        build_upsampler("jbx", None, backbone(8))
    with pytest.raises(JobError, match="bilinear"):
        build_upsampler("bilinear", "weights.pth", backbone(8))
    for name in ("lift", "anyup"):
        with pytest.raises(JobError, match=f"{name} needs its weights: pass --upsampler-weights"):
            build_upsampler(name, None, backbone(8))


def test_bad_arguments_are_named():
    low, images = torch.zeros(1, 4, 5, 5), random_images(1, 80, 80)
    for arguments, words in [
        ((low[0], images, (80, 80)), "features"),
        ((low, images.float(), (80, 80)), "images"),
        ((low, images, (0, 80)), "size"),
    ]:
        with pytest.raises(ValueError, match=words):
            JBU()(*arguments)
    with pytest.raises(ValueError, match="components"):
        JBU().fold(torch.zeros(4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="need the weights' 6"):
        learned(6).fold(torch.zeros(4), torch.zeros(2, 4))


def test_learned_weights_without_the_final_convolution_are_for_every_backbone():
    """They do not mix channels, so any number is upsampled alike; and what guides them matters."""
    images, upsampler = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), shared_by_backbones()
    features = torch.randn(1, 5, 4, 4)
    every = upsampler(features, images, (64, 64))
    assert_close(upsampler(features[:, 2:4], images, (64, 64)), every[:, 2:4], 2e-6)
    assert (upsampler(features, images.flip(3), (64, 64)) - every).abs().max() > 0.01


@torch.inference_mode()
def test_wide_kernels_are_those_of_the_first_two_stages():
    low, images = torch.randn(1, 3, 5, 6), random_images(1, 80, 96)
    expected = low
    for radius, sigma_spatial, sigma_range in ((5, 2.5, 0.05), (7, 3.5, 0.05), (3, 1.5, 0.1), (3, 1.5, 0.1)):
        guidance = F.adaptive_avg_pool2d(images / 255, (2 * expected.shape[2], 2 * expected.shape[3]))
        expected = reference.bilateral_stage(expected, guidance, sigma_spatial, sigma_range, radius)
    assert_close(wide()(low, images, (80, 96)), expected, 1e-5)
    assert wide().identity() != JBU().identity() == build_upsampler("jbu", None, backbone(6)).identity()


def test_kernels_are_chosen_without_weights_only(tmp_path):
    weights = saved(tmp_path / "jbu.pth", random_state(6))
    with pytest.raises(JobError, match=r"--jbu-kernels wide: with --upsampler-weights .*jbu\.pth, kernels are learned"):
        build_upsampler("jbu", weights, backbone(6), JBUOptions(jbu_kernels="wide"))


def test_withdrawn_weights_say_so():
    with pytest.raises(JobError, match=r"universal: these bundled weights are no longer included.*omit the option"):
        build_upsampler("jbu", "universal", backbone(5))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 9), (3, 5)])
def test_grids_that_are_too_small_are_told_without_computing(grid):
    """The answer is that of computing."""
    features, images = torch.randn(1, 6, *grid), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    anyup = AnyUpUpsampler(AnyUp(16).eval())
    for upsampler in (Bilinear(), JBU(), wide(), shared_by_backbones(), anyup):
        try:
            upsampler.check_grid(6, grid)
            told = True
        except ValueError:
            told = False
        try:
            with torch.no_grad():
                upsampler.with_basis(torch.zeros(6), torch.eye(2, 6))(features, images, (32, 32))
            computed = True
        except ValueError:
            computed = False
        assert told == computed, upsampler.name
