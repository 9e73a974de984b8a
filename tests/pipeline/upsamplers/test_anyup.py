import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.window.attention import tiled
from kernels.window.attention.reference import windowed_attention as full_attention
from pipeline.errors import JobError
from pipeline.upsamplers.anyup import blocks as anyup_blocks
from pipeline.upsamplers.anyup import stream as anyup_stream
from pipeline.upsamplers.anyup.blocks import Encoder, FeatureEmbedding, Rope, rotate
from pipeline.upsamplers.anyup.network import AnyUp
from pipeline.upsamplers.anyup.stream import encode
from tests.helpers.rounding import assert_close

GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "anyup.npz"


pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that even the images of these tests take many."""
    monkeypatch.setitem(anyup_stream._TILE_PIXELS, "cpu", 50)
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 5000)
    monkeypatch.setattr(anyup_blocks, "_EMBEDDED_BYTES", 5000)


def random_anyup(chs=16, dtype=torch.float64):
    anyup = AnyUp(chs)
    for parameter in anyup.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return anyup.to(dtype).eval()


def random_inputs(B=2, C=10, grid=(3, 4), image=(21, 28), dtype=torch.float64):
    return torch.randn(B, C, *grid, dtype=dtype), torch.randn(B, 3, *image, dtype=dtype)


# --- Against AnyUp's own results ---


@pytest.mark.parametrize(("name", "size"), [("output", None), ("output_24x32", (24, 32))])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_golden(name, size, with_gradients):
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    golden = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}
    anyup = AnyUp.from_state({n.removeprefix("state/"): t for n, t in golden.items() if n.startswith("state/")})
    with torch.set_grad_enabled(with_gradients):
        output = anyup(golden["source"], golden["source"], golden["image"], size)
    assert output.requires_grad == with_gradients
    assert_close(output.detach(), golden[name], 2e-5)


# --- The two ways through the network ---


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("grid", "image", "size"),
    [
        ((3, 4), (21, 28), None),
        ((3, 4), (21, 28), (13, 9)),
        ((5, 2), (23, 11), (40, 31)),  # larger than the image
        ((6, 7), (30, 70), (3, 4)),  # smaller than the grid
        ((2, 2), (5, 5), (1, 1)),
    ],
)
def test_streaming_agrees_with_the_modules(grid, image, size):
    anyup = random_anyup()
    features, pixels = random_inputs(grid=grid, image=image)
    recorded = anyup(features, features, pixels, size)
    queries, keys = anyup._recorded(features, pixels, size or image)
    with torch.no_grad():
        streamed = anyup(features, features, pixels, size)
    assert streamed.shape == (2, 10, *(size or image))
    for expected in (recorded, full_attention(queries, keys, features, 0.1)):
        assert_close(streamed, expected, 1e-12, size=features.abs().max())  # of which they are averages


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scratch", [False, True])
def test_an_encoder_streams_exactly_whatever_the_mean(scratch):
    """Group normalisation of values far from 0, in float32: sums of squares would cancel."""
    encoder = Encoder(nn.Conv2d(3, 16, 1, bias=False), 16)
    image = torch.randn(2, 3, 20, 31) + 100
    pixels = image.flatten(2).transpose(1, 2)
    buffer = torch.empty(2, 620, 16)
    with torch.no_grad():
        encode(encoder, lambda tile: pixels[:, tile], buffer, torch.empty_like(buffer) if scratch else None)
        expected = encoder.double()(image.double())
    spread = expected - expected.mean((2, 3), keepdim=True)
    actual = buffer.transpose(1, 2).view(2, 16, 20, 31).double()
    assert (actual - expected).abs().max() < 1e-4 * spread.abs().max()


@torch.inference_mode()
def test_rows_of_a_batch_do_not_depend_on_each_other():
    anyup = random_anyup(dtype=torch.float32)
    features, image = random_inputs(B=3, dtype=torch.float32)
    whole = anyup(features, features, image)
    for row in range(3):
        part = slice(row, row + 1)
        assert torch.equal(anyup(features[part], features[part], image[part])[0], whole[row])


@torch.inference_mode()
def test_images_at_once_agree_with_one_at_a_time(monkeypatch):
    anyup = random_anyup()
    features, image = random_inputs(B=3)
    expected = anyup(features, features, image)
    monkeypatch.setattr(AnyUp, "_images_at_once", lambda self, image: 2)  # as on a GPU
    assert_close(anyup(features, features, image), expected, 1e-12)


# --- What is averaged ---


@torch.inference_mode()
def test_projecting_first_equals_projecting_last():
    anyup = random_anyup()
    features, image = random_inputs()
    mean, components = torch.randn(10).double(), torch.linalg.qr(torch.randn(10, 10).double())[0][:4]
    full = anyup(features, features, image, (17, 19)) - mean[:, None, None]
    low = torch.einsum("kc,bchw->bkhw", components, features - mean[:, None, None])
    assert_close(anyup(features, low, image, (17, 19)), torch.einsum("kc,bchw->bkhw", components, full), 1e-12)


@torch.inference_mode()
def test_constants_stay_constant():
    features, image = random_inputs(dtype=torch.float32)
    output = random_anyup(dtype=torch.float32)(features, torch.full((2, 3, 3, 4), 2.5), image)
    assert_close(output, torch.full_like(output, 2.5), 1e-6)


@torch.inference_mode()
def test_features_without_length_are_taken():
    features, image = random_inputs(dtype=torch.float32)
    features[:, :, 1, 1] = 0
    assert random_anyup(dtype=torch.float32)(features, features, image).isfinite().all()


# --- Its parts, against what the words say ---


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("C", "grid"), [(1, (2, 3)), (5, (4, 3)), (12, (3, 7)), (16, (2, 2))])
def test_feature_embedding_is_the_explicit_loop(C, grid):
    embedding = FeatureEmbedding(8).double()
    features = torch.randn(2, C, *grid, dtype=torch.float64)
    responses = torch.zeros(2, C * 8, *grid, dtype=torch.float64)
    for c, o, y, x in np.ndindex(C, 8, *grid):
        taps = [
            (features[:, c, y + a - 2, x + b - 2] * embedding.basis[o, 0, a, b])
            for a, b in np.ndindex(5, 5)
            if 0 <= y + a - 2 < grid[0] and 0 <= x + b - 2 < grid[1]
        ]
        responses[:, 8 * c + o, y, x] = sum(taps) / len(taps)
    every_Cth = torch.stack([torch.softmax(responses[:, first::C], 1) for first in range(C)])
    torch.testing.assert_close(embedding(features), every_Cth.mean(0))


def test_rope_rotates_pairs_half_the_channels_apart():
    rope = Rope(8)
    assert rope.freqs[:, [0, 1]].tolist() == [[pytest.approx(2 * math.pi), pytest.approx(0.02 * math.pi)], [0, 0]]
    x, angles = torch.randn(3, 8), torch.randn(3, 8)
    angles[:, 4:] = angles[:, :4]
    pairs = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones(3, 4), angles[:, :4])
    torch.testing.assert_close(rotate(x, angles), torch.cat([pairs.real, pairs.imag], 1))
    steps = rope.angles(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(steps[1, 2], rope.freqs.sum(0))


# --- Precision, training, memory ---


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 3e-2), (torch.bfloat16, 0.2)])
@torch.inference_mode()
def test_half_precision(dtype, rtol):
    anyup = random_anyup()
    features, image = random_inputs()
    expected = anyup(features, features, image)
    output = anyup.to(dtype)(features.to(dtype), features.to(dtype), image.to(dtype))
    assert output.dtype == dtype
    assert_close(output.double(), expected, rtol)


def test_training_reaches_every_parameter_that_does_something():
    anyup = random_anyup().train()
    features, image = random_inputs()
    anyup(features, features, image, (11, 13)).square().mean().backward()
    idle = {n for n, p in anyup.named_parameters() if p.grad is None}
    assert idle == {f"cross_decode.cross_attn.attention.out_proj.{n}" for n in ("weight", "bias")}
    assert all(p.grad.isfinite().all() for p in anyup.parameters() if p.grad is not None)


class Allocations(TorchDispatchMode):
    """Storages, larger than a limit, that operations made, alive or not: bytes by address."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.large = limit, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() > self.limit and storage.data_ptr() not in inputs:
                self.large.append(storage.nbytes())
        return result


@pytest.mark.parametrize("scale", [1, 2])
def test_only_buffers_grow_with_the_image(scale, monkeypatch):
    monkeypatch.setitem(anyup_stream._TILE_PIXELS, "cpu", 256)
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 1 << 17)
    anyup = random_anyup(dtype=torch.float32)
    H, W = 100 * scale, 120 * scale
    features, image = random_inputs(B=1, grid=(10, 12), image=(H, W), dtype=torch.float32)
    with torch.no_grad(), Allocations(1 << 17) as allocations:
        output = anyup(features, features[:, :4].contiguous(), image)
    buffer = H * W * 16 * 4
    assert sorted(allocations.large) == sorted([buffer, buffer, output.nbytes, output.nbytes])


# --- Checkpoints and errors ---


@torch.inference_mode()
def test_a_checkpoint_loads_with_and_without_a_prefix():
    anyup, (features, image) = random_anyup(dtype=torch.float32), random_inputs(dtype=torch.float32)
    expected = anyup(features, features, image)
    for prefix in ("", "module."):
        loaded = AnyUp.from_state({prefix + name: tensor for name, tensor in anyup.state_dict().items()})
        assert not loaded.training
        assert torch.equal(loaded(features, features, image), expected)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("rope.freqs"), "rope.freqs"),
        (lambda state: state.pop("image_encoder.0.weight"), "got nothing for image_encoder.0.weight"),
        (lambda state: state.update({"image_encoder.0.weight": torch.zeros(12, 3, 1, 1)}), "multiple of 8"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "extra"),
        (lambda state: state.update({"aggregation.0.weight": torch.zeros(2)}), "aggregation.0.weight"),
        (lambda state: state.clear(), "among 0 tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(spoil, words):
    state = AnyUp(16).state_dict()
    spoil(state)
    with pytest.raises(JobError, match=re.escape(words)):
        AnyUp.from_state(state)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": torch.zeros(2, 10, 1, 4)}, r"features: .*at least 2: the border is reflected"),
        ({"features": torch.zeros(10, 3, 4)}, r"features: got \(10, 3, 4\)"),
        ({"features": torch.zeros(2, 0, 3, 4)}, "features"),
        ({"features": torch.zeros(2, 10, 3, 4).half()}, r"features: .*float16, need .*float32"),
        ({"values": torch.zeros(2, 4, 3, 3)}, r"values: got \(2, 4, 3, 3\) .*need \[2, k, 3, 4\]"),
        ({"values": torch.zeros(2, 0, 3, 4)}, "values"),
        ({"image": torch.zeros(1, 3, 21, 28)}, r"image: got \(1, 3, 21, 28\)"),
        ({"image": torch.zeros(2, 3, 21, 28, dtype=torch.uint8)}, "image: .*uint8"),
        ({"size": (0, 3)}, r"size: got \(0, 3\)"),
    ],
)
def test_bad_inputs_are_named(changed, message):
    features, image = random_inputs(dtype=torch.float32)
    arguments = {"features": features, "values": features, "image": image, "size": (20, 20)} | changed
    with pytest.raises(ValueError, match=message):
        random_anyup(dtype=torch.float32)(**arguments)


def test_bad_channels_are_named():
    with pytest.raises(ValueError, match="chs: got 12, need a multiple of 8"):
        AnyUp(12)
    with pytest.raises(ValueError, match="of 0 heads"):
        AnyUp(16, heads=0)


def test_reflection_is_at_the_border_only():
    """The joined keys are convolved with a reflected border, the queries with zeros: as published."""
    anyup = AnyUp(16)
    assert anyup.aggregation[0].padding_mode == "reflect"
    assert anyup.cross_decode.conv2d.padding_mode == "zeros"
    queries = torch.randn(1, 9, 7, 16)
    decoded = anyup.cross_decode.conv2d(queries.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = anyup._project_queries(decoded).detach()
    with torch.no_grad():
        anyup._decode_in_place(queries)
    assert_close(queries, expected, 1e-5)
