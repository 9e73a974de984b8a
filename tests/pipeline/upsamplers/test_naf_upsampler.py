"""NAF as an upsampler: PCA, sizes, codes, checkpoints. Its network: test_naf.py."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels.quantization import Encoding
from pipeline.errors import JobError
from pipeline.upsamplers.build import UPSAMPLERS, build_upsampler, describe_upsamplers
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.naf.network import NAF
from pipeline.upsamplers.naf.upsampler import NAFUpsampler, computed_size
from tests.helpers.rounding import assert_close


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_network():
    naf = NAF(32).eval()
    for parameter in naf.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return naf


def saved(path, state):
    torch.save(state, path)
    return str(path)


def backbone(num_chs=8):
    return SimpleNamespace(num_chs=num_chs, reduction=16)


def naf(path):
    return build_upsampler("naf", saved(path / "naf.pth", random_network().state_dict()), backbone())


def random_images(B=2, H=50, W=60):
    return torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8)


def random_basis(C=8, k=5):
    return torch.randn(C), torch.linalg.qr(torch.randn(C, C))[0][:k]


@pytest.mark.parametrize(
    ("grid", "size", "expected"),
    [
        ((14, 14), (224, 224), (224, 224)),
        ((15, 16), (224, 224), (225, 224)),
        ((10, 11), (35, 40), (40, 44)),  # halves up
        ((10, 11), (34, 38), (30, 33)),
        ((10, 11), (3, 100), (10, 99)),  # never below the grid
    ],
)
def test_the_size_that_is_computed_is_the_nearest_multiple(grid, size, expected):
    assert computed_size(grid, size) == expected


@pytest.mark.parametrize(("grid", "size"), [((5, 4), (20, 12)), ((10, 11), (35, 40)), ((3, 4), (2, 30))])
@torch.inference_mode()
def test_projecting_first_equals_projecting_last(tmp_path, grid, size):
    """All C channels, then PCA in float64: C channels are k, with a basis of ones."""
    upsampler, images, features = naf(tmp_path), random_images(), torch.randn(2, 8, *grid) + 1
    mean, components = random_basis()
    upsampler.naf.double()
    queries = upsampler.naf.encode(imagenet_normalised(images).double(), computed_size(grid, size))
    full = F.interpolate(upsampler.naf.upsample(queries, features.double()), size, mode="bilinear", align_corners=False)
    centred = full - mean.double()[:, None, None]
    expected = torch.einsum("kc,bchw->bkhw", components.double(), centred)
    upsampler.naf.float()
    output = upsampler.with_basis(mean, components)(features, images, size)
    assert (output.shape, output.dtype) == ((2, 5, *size), torch.float32)
    assert_close(output, expected, 1e-5)


@torch.inference_mode()
def test_components_are_not_channels(tmp_path):
    """What would be wrong: k components as if they were channels go to other heads."""
    upsampler, images, features = naf(tmp_path), random_images(), torch.randn(2, 8, 5, 4)
    components = random_basis(k=4)[1]
    right = upsampler.with_basis(torch.zeros(8), components)(features, images, (20, 12))
    low = torch.einsum("kc,bchw->bkhw", components, features)
    wrong = upsampler.naf.upsample(upsampler.encode(images, (20, 12)), low)
    assert (right - wrong).abs().max() > 0.05 * right.abs().max()


@torch.inference_mode()
def test_images_of_a_batch_do_not_depend_on_each_other(tmp_path):
    projected, images = naf(tmp_path).with_basis(*random_basis()), random_images(3)
    features, encoding = torch.randn(3, 8, 5, 4), Encoding(torch.rand(5) / 10 + 0.01)
    for size in ((20, 12), (19, 14)):
        whole = projected(features, images, size)
        codes = projected.encode(features, images, size, encoding).values.codes
        for row in range(3):
            part = slice(row, row + 1)
            assert torch.equal(projected(features[part], images[part], size)[0], whole[row])
            alone = projected.encode(features[part], images[part], size, encoding).values.codes
            assert torch.equal(alone[0], codes[row])


@pytest.mark.parametrize("size", [(20, 12), (19, 14)])
@torch.inference_mode()
def test_codes_are_the_quantized_features(tmp_path, size):
    """Written by the attention where the size is a multiple of the grid, else after an interpolation."""
    projected, images = naf(tmp_path).with_basis(*random_basis()), random_images(3)
    features = 2 * torch.randn(3, 8, 5, 4)
    features[1, 2, 1, 3] = torch.nan
    for encoding in (Encoding(torch.rand(5) / 10 + 0.01), Encoding(None)):
        stored = projected.encode(features, images, size, encoding)
        expected = encoding.encode(projected(features, images, size))
        assert stored.failures.keys() == {1}
        for actual, wanted in zip(stored.values, expected, strict=True):
            assert torch.equal(actual.nan_to_num(), wanted.nan_to_num())


@torch.inference_mode()
def test_images_encoded_once_serve_several_backbones(tmp_path):
    upsampler, images = naf(tmp_path), random_images()
    queries = upsampler.encode(images, (24, 24))
    for C, grid in ((8, (8, 6)), (12, (4, 12))):
        features, projected = torch.randn(2, C, *grid), upsampler.with_basis(*random_basis(C, 3))
        for size in ((24, 24), (23, 25)):
            assert torch.equal(projected.upsample(features, queries, size), projected(features, images, size))


def test_it_is_described_and_known_by_its_weights(tmp_path):
    identity = naf(tmp_path).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity != naf(tmp_path).identity()  # other random weights
    assert "\n  naf " in "\n" + describe_upsamplers()
    assert UPSAMPLERS["naf"] is NAFUpsampler
    assert naf(tmp_path).explain(torch.device("cpu")).startswith("cpu")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_loads_with_and_without_its_wrapping(tmp_path, wrap, prefix):
    """Both projects publish the bare state dictionary; training may wrap it."""
    state = random_network().state_dict()
    weights = saved(tmp_path / "naf_release.pth", wrap({prefix + name: tensor for name, tensor in state.items()}))
    loaded = build_upsampler("naf", weights, backbone())
    assert all(torch.equal(loaded.naf.state_dict()[name], tensor) for name, tensor in state.items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_are_needed_and_must_be_its_own(tmp_path):
    with pytest.raises(JobError, match="naf needs its weights: pass --upsampler-weights"):
        build_upsampler("naf", None, backbone())
    other = saved(tmp_path / "other.pth", {"up1.range_temp": torch.zeros(())})
    with pytest.raises(JobError, match=re.escape("other.pth: NAF weights: got nothing for")):
        build_upsampler("naf", other, backbone())


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 9), (12, 3)])
def test_every_grid_is_taken(tmp_path, grid):
    upsampler = naf(tmp_path)
    upsampler.check_grid(8, grid)
    output = upsampler.with_basis(*random_basis())(torch.randn(1, 8, *grid), random_images(1), (24, 18))
    assert output.isfinite().all()


def test_bad_arguments_are_named(tmp_path):
    upsampler, features, images = naf(tmp_path), torch.zeros(1, 8, 5, 4), random_images(1)
    with pytest.raises(ValueError, match="features: got 10 channels, need a multiple of the 4 heads"):
        upsampler.check_grid(10, (5, 4))
    with pytest.raises(ValueError, match="components"):
        upsampler.with_basis(torch.zeros(8), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"images: .*float32, need \[B, 3, H, W\] of uint8"):
        upsampler.encode(images.float(), (20, 12))
    projected, encoding = upsampler.with_basis(*random_basis()), Encoding(torch.ones(5))
    for arguments, words in [
        ((features[0], images, (20, 12)), "features"),
        ((features, images.float(), (20, 12)), "images"),
        ((features, images[:0], (20, 12)), "images"),
        ((features, images, (0, 12)), "size"),
    ]:
        for call in (projected, lambda *given: projected.encode(*given, encoding)):
            with pytest.raises(ValueError, match=words):
                call(*arguments)
    with pytest.raises(ValueError, match=r"queries: got \(1, 15, 12, 4, 8\), need \[B, 20, 12, heads, d\]"):
        projected.upsample(features, upsampler.encode(images, (15, 12)), (20, 12))
