import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.window.neighborhood.reference import neighborhood_attention as literal
from pipeline.errors import JobError
from pipeline.upsamplers.naf import network, stream
from pipeline.upsamplers.naf.blocks import Branch, Rope, rotate
from pipeline.upsamplers.naf.network import NAF
from pipeline.upsamplers.naf.stream import encode_image
from tests.helpers.rounding import assert_close

GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "naf.npz"


pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


@pytest.fixture
def small_strips(monkeypatch):
    """So small that even the images of these tests take many."""
    monkeypatch.setitem(stream._STRIP_PIXELS, "cpu", 50)
    monkeypatch.setitem(network._ROTATED_PIXELS, "cpu", 50)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    return {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}


@pytest.fixture(scope="module")
def published(golden):
    return NAF.from_state({n.removeprefix("state/"): t for n, t in golden.items() if n.startswith("state/")})


def random_naf(chs=32, heads=4, dtype=torch.float64):
    naf = NAF(chs, heads)
    for parameter in naf.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return naf.to(dtype).eval()


def random_inputs(B=2, C=8, grid=(3, 4), image=(21, 28), dtype=torch.float64):
    return torch.randn(B, C, *grid, dtype=dtype), torch.randn(B, 3, *image, dtype=dtype)


# --- Against the published module's results ---


@pytest.mark.parametrize("case", ["integer", "rectangular", "large_image"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_golden(golden, published, case, with_gradients):
    features, image, expected = (golden[f"{case}/{part}"] for part in ("features", "image", "output"))
    with torch.set_grad_enabled(with_gradients):
        output = published(features, image, tuple(expected.shape[2:]))
    assert output.requires_grad == with_gradients
    assert_close(output.detach(), expected, 1e-5)


@torch.inference_mode()
def test_golden_of_another_ratio(golden, published):
    """Where the size is no multiple, only the reference dilates as the published module."""
    features, image, expected = (golden[f"ratio/{part}"] for part in ("features", "image", "output"))
    queries = published.encode(image, (35, 40))
    output = literal(queries, published.keys(queries, (10, 11)), features, 9, False)
    assert_close(output, expected, 1e-5)
    with pytest.raises(ValueError, match="got a size of 35×40, need whole multiples of the keys' 10×11"):
        published.upsample(queries, features)


def test_the_published_network_is_the_default(published):
    default = NAF()
    assert {n: t.shape for n, t in default.state_dict().items()} == {
        n: t.shape for n, t in published.state_dict().items()
    }
    assert sum(p.numel() for p in default.parameters()) == 662_528
    assert published.heads == default.heads == 4
    torch.testing.assert_close(default.image_encoder.rope.periods, published.image_encoder.rope.periods)


# --- The two ways through the network ---


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((21, 28), (21, 28)),
        ((21, 28), (9, 12)),
        ((23, 11), (40, 31)),  # larger than the image
        ((30, 70), (3, 4)),  # the image is resized first
        ((2, 2), (5, 5)),
        ((2, 90), (6, 8)),  # rows longer than a strip
        ((90, 2), (30, 2)),
    ],
)
def test_streaming_agrees_with_the_modules(image, size):
    naf, pixels = random_naf(), random_inputs(image=image)[1]
    recorded = naf.encode(pixels, size)
    assert recorded.requires_grad
    with torch.no_grad():
        streamed = naf.encode(pixels, size)
    assert streamed.shape == (2, *size, 4, 8)
    assert streamed.is_contiguous()
    assert_close(streamed, recorded, 1e-12)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize("kernel_size", [1, 3])
@torch.no_grad()
def test_a_branch_streams_exactly_whatever_the_mean(kernel_size):
    """Group normalisation of values far from 0, in float32: sums of squares would cancel."""
    branch, image = Branch(16, kernel_size), torch.randn(2, 3, 20, 31) + 100
    actual = encode_image(branch, image).permute(0, 3, 1, 2).double()
    expected = branch.double()(image.double())
    spread = expected - expected.mean((2, 3), keepdim=True)
    assert (actual - expected).abs().max() < 1e-4 * spread.abs().max()


@torch.inference_mode()
def test_rows_of_a_batch_do_not_depend_on_each_other():
    naf, (features, image) = random_naf(dtype=torch.float32), random_inputs(B=3, dtype=torch.float32)
    whole = naf(features, image, (9, 12))
    for row in range(3):
        part = slice(row, row + 1)
        assert torch.equal(naf(features[part], image[part], (9, 12))[0], whole[row])


@torch.inference_mode()
def test_images_at_once_agree_with_one_at_a_time(monkeypatch):
    naf, (features, image) = random_naf(), random_inputs(B=3)
    expected = naf(features, image, (9, 12))
    monkeypatch.setattr(NAF, "images_at_once", lambda self, image: 2)  # as on a GPU
    assert_close(naf(features, image, (9, 12)), expected, 1e-12)


@pytest.mark.parametrize("scale", [1, 2])
def test_only_two_buffers_grow_with_the_image(scale, monkeypatch):
    monkeypatch.setitem(stream._STRIP_PIXELS, "cpu", 256)
    monkeypatch.setitem(network._ROTATED_PIXELS, "cpu", 256)
    made, empty = [], torch.Tensor.new_empty

    def noted(self, *size, **options):
        tensor = empty(self, *size, **options)
        made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    H, W = 40 * scale, 50 * scale
    with torch.no_grad():
        queries = random_naf(dtype=torch.float32).encode(torch.randn(1, 3, H, W), (H, W))
    large = sorted(size for size in made if size > 1 << 16)
    assert large == [queries.nbytes // 2, queries.nbytes // 2, queries.nbytes]  # one branch after the other


# --- Images that are encoded once ---


@torch.inference_mode()
def test_encoded_images_serve_several_backbones():
    naf, (features, image) = random_naf(), random_inputs()
    others = torch.randn(2, 12, 6, 4, dtype=torch.float64)
    queries = naf.encode(image, (12, 16))
    assert torch.equal(naf.upsample(queries, features), naf(features, image, (12, 16)))
    assert torch.equal(naf.upsample(queries, others), naf(others, image, (12, 16)))


@torch.inference_mode()
def test_keys_are_means_of_rotated_queries():
    naf, image = random_naf(), random_inputs()[1]
    queries = naf.encode(image, (6, 8))
    expected = queries.view(2, 3, 2, 4, 2, 4, 8).mean((2, 4))
    torch.testing.assert_close(naf.keys(queries, (3, 4)), expected)


@torch.inference_mode()
def test_constants_stay_constant():
    output = random_naf(dtype=torch.float32)(
        torch.full((2, 8, 3, 4), 2.5), random_inputs(dtype=torch.float32)[1], (9, 12)
    )
    assert_close(output, torch.full_like(output, 2.5), 1e-6)


# --- Its parts, against what the words say ---


def test_rope_rotates_pairs_half_a_head_apart():
    rope, size = Rope(8), (3, 5)
    assert rope.periods.tolist() == [1.0, pytest.approx(10.0)]
    angles = rope.angles(size, slice(1, 3), torch.float64)
    assert angles.shape == (2, 5, 1, 4)
    y, x = (2 * 1.5 / 3 - 1), (2 * 4.5 / 5 - 1)  # of row 1 and column 4
    expected = 2 * torch.pi * torch.tensor([y, y / 10, x, x / 10], dtype=torch.float64)
    torch.testing.assert_close(angles[0, 4, 0], expected)
    vectors = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    pairs = torch.complex(vectors[..., :4], vectors[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(vectors, angles), torch.cat([pairs.real, pairs.imag], -1))


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        ((40, 60), (10, 15), (40, 60)),
        ((41, 60), (10, 15), (40, 40)),  # both limits are for both axes
        ((30, 61), (10, 15), (30, 40)),
        ((100, 200), (20, 10), (40, 40)),
    ],
)
def test_large_images_are_resized_first(image, size, expected):
    pixels = torch.randn(1, 3, *image)
    reduced = network._reduced(pixels, size)
    assert reduced.shape[2:] == expected
    wanted = F.interpolate(pixels, expected, mode="bilinear", align_corners=False)
    assert torch.equal(reduced, pixels if expected == image else wanted)


# --- Precision, training ---


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 2e-2), (torch.bfloat16, 0.15)])
@torch.inference_mode()
def test_half_precision(dtype, rtol):
    """Images are encoded in their own dtype, whatever that of the parameters."""
    naf, (features, image) = random_naf(dtype=torch.float32), random_inputs()
    queries = naf.encode(image.to(dtype), (9, 12))
    assert queries.dtype == dtype
    expected = naf.double().encode(image, (9, 12))
    assert_close(queries, expected, rtol)
    output = naf.upsample(queries, features.to(dtype))
    assert output.dtype == dtype
    assert_close(output, naf.upsample(expected, features), rtol)


def test_training_reaches_every_parameter():
    naf, (features, image) = random_naf().train(), random_inputs()
    naf(features, image, (9, 12)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in naf.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-3), (torch.float16, 2e-2)])
@torch.inference_mode()
def test_gpu(dtype, rtol):
    naf = random_naf(chs=64, dtype=torch.float32)
    features, image = random_inputs(B=3, grid=(14, 16), image=(100, 120), dtype=torch.float32)
    queries = naf.double().encode(image.double(), (70, 80))
    expected = naf.upsample(queries, features.double())
    naf = naf.float().cuda()
    output = naf.upsample(naf.encode(image.cuda().to(dtype), (70, 80)), features.cuda().to(dtype))
    assert_close(output.cpu(), expected, rtol)


# --- Checkpoints and errors ---


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("image_encoder.rope.periods"), "nothing for image_encoder.rope.periods"),
        (lambda state: state.pop("image_encoder.encoder.0.weight"), "got nothing for image_encoder.encoder.0.weight"),
        (lambda state: state.update({"image_encoder.encoder.0.weight": torch.zeros(12, 3, 1, 1)}), "(12, 3, 1, 1)"),
        (lambda state: state.update({"image_encoder.rope.periods": torch.zeros(5)}), "(5,)"),
        (lambda state: state.pop("image_encoder.sem_encoder.2.conv2.bias"), "sem_encoder.2.conv2.bias"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "extra"),
        (lambda state: state.update({"image_encoder.sem_encoder.0.weight": torch.zeros(16, 3, 1, 1)}), "sem_encoder.0"),
        (lambda state: state.clear(), "among 0 tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(spoil, words):
    state = NAF(32).state_dict()
    spoil(state)
    with pytest.raises(JobError, match=re.escape(words)):
        NAF.from_state(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 1, 28), (9, 12)), r"image: got \(2, 3, 1, 28\).*at least 2: the border is reflected"),
        ((torch.zeros(2, 1, 21, 28), (9, 12)), r"image: got \(2, 1, 21, 28\)"),
        ((torch.zeros(2, 3, 21, 28, dtype=torch.uint8), (9, 12)), "image: .*uint8"),
        ((torch.zeros(2, 3, 21, 28), (0, 12)), r"size: got \(0, 12\)"),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NAF(32).encode(*arguments)


@pytest.mark.parametrize(("chs", "heads"), [(24, 4), (48, 5), (0, 4), (32, 0)])
def test_bad_channels_are_named(chs, heads):
    with pytest.raises(ValueError, match=f"chs: got {chs}, need a multiple of 16"):
        NAF(chs, heads)
