import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file

from densefeat.torch.bilateral import StageSettings
from kernels.multiview import Solution
from kernels.quantization import Encoding
from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.jbu import JBU
from pipeline.upsamplers.multiview.pooling import FitSettings, Origin, PoolingModel
from pipeline.upsamplers.multiview.upsampler import _unsolved
from pipeline.upsamplers.multiview.views import solver_views
from pipeline.views.features import JitterMatrices, view_features
from pipeline.views.jitter import view_images
from schemas.upsamplers import MultiviewOptions
from tests.helpers.rounding import assert_close

SIZE, K = (64, 96), 5


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("resnet18", size=SIZE, weights="random", layer=2)


@pytest.fixture
def pooling(backbone):
    torch.manual_seed(0)
    origin = Origin(backbone.identity(), backbone.size, backbone.grid, {"images": "s3://somewhere"})
    return PoolingModel(torch.randn(backbone.num_chs, *backbone.grid) / 10, FitSettings(2.0, 4, 2, 0.5, 3), origin)


@pytest.fixture
def weights(pooling, tmp_path):
    path = tmp_path / "pooling.safetensors"
    path.write_bytes(pooling.to_bytes())
    return str(path)


def random_images(B, size=SIZE):
    return F.interpolate(torch.randint(0, 256, (B, 3, 5, 7)).float(), size).to(torch.uint8)


def projected(upsampler, num_chs):
    torch.manual_seed(1)
    return upsampler.with_basis(torch.randn(num_chs) / 10, torch.linalg.qr(torch.randn(num_chs, K))[0].T)


def test_a_file_reads_back(pooling, weights, backbone):
    read = PoolingModel.read(weights)
    assert (read.settings, read.digest) == (pooling.settings, pooling.digest)
    assert read.origin.account == {"images": "s3://somewhere"}
    read.check(backbone, weights)
    assert pooling.to_bytes() == read.to_bytes()


def as_before(pooling, **changed):
    """A file as jobs/fit_pooling.py wrote it before it shared the metadata of trained weights."""
    document = {"format": 1, "settings": asdict(pooling.settings), "origin": asdict(pooling.origin)}
    return save({"bias": pooling.bias}, {"densefeat": json.dumps({**document, **changed})})


def test_a_file_written_before_reads_the_same(pooling, weights, backbone, tmp_path):
    path = tmp_path / "before.safetensors"
    path.write_bytes(as_before(pooling))
    read = PoolingModel.read(str(path))
    assert (read.settings, read.digest) == (pooling.settings, pooling.digest)
    assert read.origin == PoolingModel.read(weights).origin
    before, now = (build_upsampler("multiview", file, backbone).identity() for file in (str(path), weights))
    assert before == now
    words = "for the upsampler multiview, but this job uses lift: pass --upsampler multiview"
    for file in (str(path), weights):
        with pytest.raises(JobError, match=words):
            build_upsampler("lift", file, backbone)
    for changed in ({"format": 2}, {"origin": {}}, {"settings": {"views": 3}}):
        path.write_bytes(as_before(pooling, **changed))
        with pytest.raises(JobError, match=r"before.*jobs/fit_pooling"):
            PoolingModel.read(str(path))


def test_a_file_for_another_backbone_names_both(weights):
    other = build_backbone("resnet18", size=SIZE, weights="random", layer=1)
    with pytest.raises(
        JobError, match=r"resnet18 at layer 2 .*, this job has resnet18 at layer 1: .*Omit --upsampler-w"
    ):
        build_upsampler("multiview", weights, other)


def test_a_file_carries_over_to_another_size(pooling, weights):
    larger = build_backbone("resnet18", size=(128, 160), weights="random", layer=2)
    upsampler = build_upsampler("multiview", weights, larger)
    bias = upsampler._bias(torch.eye(larger.num_chs, dtype=torch.float64))
    assert bias.shape == (larger.num_chs, *larger.grid)
    assert bias.mean((1, 2)).abs().max() < 1e-6
    expected = F.interpolate(pooling.bias[None], larger.grid, mode="bilinear")[0]
    assert_close(bias, expected - expected.mean((1, 2), keepdim=True), 1e-6)
    projected = upsampler.with_basis(torch.zeros(128), torch.eye(4, 128))
    images = random_images(1, (128, 160))
    assert projected(larger(images), images, (40, 50)).isfinite().all()


def test_without_weights_it_is_fitted_first(backbone):
    upsampler = build_upsampler("multiview", None, backbone, MultiviewOptions(views=3))
    assert "sigma_px" not in upsampler.identity()
    assert upsampler.identity()["views"] == 3
    upsampler.check_grid(backbone.num_chs, backbone.grid)
    basis = torch.zeros(128), torch.eye(K, 128)
    with pytest.raises(ValueError, match="need a fit to the images"):
        upsampler.with_basis(*basis)
    usual = upsampler.fitting().usual(K)
    assert {"sigma_px", "regularisation", "iterations"} == usual.settings.keys()
    images = random_images(2)
    features = backbone(images)
    high = upsampler.fitted(usual).with_basis(*basis)(features, images, SIZE)
    biased = replace(usual, arrays={"bias": usual.arrays["bias"] + np.float32(0.5)})
    assert biased.identity() != usual.identity()
    assert_close(upsampler.fitted(biased).with_basis(*basis)(features, images, SIZE), high - 0.5, 1e-4)
    with pytest.raises(ValueError, match="need those of the fit"):
        upsampler.fitted(usual).with_basis(torch.zeros(128), torch.eye(K + 1, 128))
    with pytest.raises(TypeError, match="is not fitted to images"):
        build_upsampler("jbu", None, backbone).fitted(usual)


def test_what_is_no_such_file_is_refused(tmp_path, backbone, weights):
    damaged = tmp_path / "damaged.safetensors"
    for data in (b"", b"nonsense" * 9, Path(weights).read_bytes()[:-50]):
        damaged.write_bytes(data)
        with pytest.raises(JobError, match=r"damaged.*jobs/fit_pooling"):
            build_upsampler("multiview", str(damaged), backbone)
    save_file({"bias": torch.zeros(1)}, damaged, {"upsampler": "lift"})
    torch.save({"bias": torch.zeros(1)}, tmp_path / "damaged.pth")
    for name, words in (
        (damaged.name, "are not a pooling model, they belong to the upsampler lift"),
        ("damaged.pth", r"got the suffix '\.pth', expected a \.safetensors file"),
        ("", r"got the suffix '', expected a \.safetensors file"),
    ):
        with pytest.raises(JobError, match=rf"{words}.*jobs/fit_pooling"):
            build_upsampler("multiview", str(tmp_path / name), backbone)
    with pytest.raises(JobError, match=r"none\.safetensors"):
        build_upsampler("multiview", str(tmp_path / "none.safetensors"), backbone)


def test_identity_says_what_the_features_depend_on(weights, backbone):
    identities = [
        build_upsampler("multiview", weights, backbone, MultiviewOptions(**options)).identity()
        for options in ({}, {"views": 3}, {"regularisation": 2.0}, {"jbu_kernels": "wide"}, {"jbu_kernels": "narrow"})
    ]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == 4
    assert identities[4] == identities[0]
    for identity in identities:
        assert json.loads(json.dumps(identity)) == identity
    assert [identity["views"] for identity in identities] == [4, 3, 4, 4, 4]
    with pytest.raises(JobError, match="--views: got 2000"):
        build_upsampler("multiview", weights, backbone, MultiviewOptions(views=2000))


@torch.inference_mode()
def test_views_are_those_of_training_in_batches_across_images(backbone):
    images, jitters = random_images(3), solver_views(SIZE, 6)[1:]
    features = view_features(backbone, images, JitterMatrices.of(jitters, torch.device("cpu")), None)
    for view, jitter in enumerate(jitters):
        expected = backbone(view_images(images, [jitter] * 3))
        assert_close(features[:, view], expected, 1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("size", [SIZE, (50, 70), (128, 192)])
def test_features_codes_and_batches(weights, backbone, size):
    stage = projected(build_upsampler("multiview", weights, backbone), backbone.num_chs)
    images = random_images(3)
    features = backbone(images)
    high = stage(features, images, size)
    assert high.shape == (3, K, *size)
    assert high.isfinite().all()
    step = torch.full((K,), 0.01)
    values, failures = stage.encode(features, images, size, Encoding(step))
    assert failures == {}
    expected = (high / step[:, None, None]).round().clamp(-127, 127)
    assert (values.codes - expected).abs().max() <= 1
    halves, _ = stage.encode(features, images, size, Encoding(None))
    assert_close(halves.codes, high, 1e-3)
    alone = stage(features[2:], images[2:], size)
    assert_close(alone, high[2:], 1e-3)  # the backbone's batches


@torch.inference_mode()
@pytest.mark.parametrize("size", [SIZE, (50, 70), (128, 192)])
def test_the_last_step_with_wide_kernels(weights, backbone, size):
    narrow, wide = (
        projected(build_upsampler("multiview", weights, backbone, MultiviewOptions(jbu_kernels=kernels)), 128)
        for kernels in ("narrow", "wide")
    )
    images = random_images(2)
    features = backbone(images)
    solved, failures = wide.before_last_step(features, images, size)
    assert failures == {}
    assert_close(solved, narrow.before_last_step(features, images, size)[0], 1e-6)
    last = JBU(settings=(StageSettings(7, 3.5, 0.05), StageSettings(3, 1.5, 0.1)))
    assert_close(wide(features, images, size), last(solved, images, size), 1e-5)
    assert (wide(features, images, size) - narrow(features, images, size)).abs().mean() > 1e-3
    assert wide.upsampler.last_step() == last.identity()


@torch.inference_mode()
def test_an_image_fails_alone_and_says_why(weights, backbone):
    stage = projected(build_upsampler("multiview", weights, backbone), backbone.num_chs)
    images = random_images(4)
    images[1] = 77
    features = backbone(images)
    features[2, 0, 1, 1] = torch.nan
    for step in (torch.ones(K), None):
        values, failures = stage.encode(features, images, SIZE, Encoding(step))
        assert {i: error.status for i, error in failures.items()} == {1: "constant", 2: "nonfinite"}
        assert "one colour" in str(failures[1])
        assert "views" in str(failures[2])
        assert (values.not_finite > 0).tolist() == [False, True, True, False]
    high = stage(features, images, SIZE)
    assert high.isfinite().flatten(1).all(1).tolist() == [True, False, False, True]


@torch.inference_mode()
def test_features_that_do_not_vary_fail(weights, backbone, monkeypatch):
    """As of a network whose activations died."""
    stage = projected(build_upsampler("multiview", weights, backbone), backbone.num_chs)
    monkeypatch.setattr(backbone, "_maps", lambda pixels: [torch.ones(len(pixels), backbone.num_chs, *backbone.grid)])
    images = random_images(2)
    _, failures = stage.encode(backbone(images), images, SIZE, Encoding(None))
    assert sorted(failures) == [0, 1]
    assert {error.status for error in failures.values()} == {"constant"}
    assert "the same everywhere" in str(failures[0])


def test_a_fit_that_got_worse_fails():
    bad = Solution(torch.ones(3, 1, 2, 2), torch.ones(3), torch.tensor([0.5, 2.0, torch.inf]), torch.ones(3, 1))
    failures = _unsolved(bad)
    assert {i: error.status for i, error in failures.items()} == {1: "diverged", 2: "nonfinite"}
    assert "from 1 to 2" in str(failures[1])


def test_bad_arguments_are_named(weights, backbone):
    upsampler = build_upsampler("multiview", weights, backbone)
    with pytest.raises(ValueError, match="need the weights' 128"):
        upsampler.with_basis(torch.zeros(4), torch.zeros(2, 4))
    stage = projected(upsampler, backbone.num_chs)
    with pytest.raises(ValueError, match="need the backbone's"):
        stage(torch.zeros(1, backbone.num_chs, 4, 6), torch.zeros(1, 3, 32, 48, dtype=torch.uint8), SIZE)
