import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.upsamplers.implicit_featup import plain_downsample
from kernels.quantization import Encoding
from pipeline.errors import ImageError, JobError
from pipeline.features.backbone import build_backbone
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.implicit import upsampler as upsample_implicit
from pipeline.upsamplers.implicit.downsample import AttentionDownsamplers, DownsamplerDropout, Windows
from pipeline.upsamplers.implicit.fit import _Fitter, fit_networks
from pipeline.upsamplers.implicit.folded import Dropout, Waves, render_folded
from pipeline.upsamplers.implicit.loss import LossWeights, loss_of_images, magnitude
from pipeline.upsamplers.implicit.network import CHANNELS, FittedNetwork, ImplicitNetworks, colour_range
from pipeline.upsamplers.implicit.schedule import DEFAULT, FAITHFUL, Schedule, sample_views
from pipeline.upsamplers.implicit.upsampler import ImplicitUpsampler
from pipeline.views.downsample import SimpleDownsampler, blur_matrix
from pipeline.views.jitter import Jitter
from schemas.index import FAILED
from schemas.options import UpsampleConfig
from schemas.upsamplers import ImplicitOptions
from tests.helpers.rounding import assert_close, term_sizes

GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "featup_implicit.npz"
SHORT = Schedule(
    views=12, held_out=3, steps=12, views_per_step=3, check_every=4, cell_px=9, max_pad_px=6, learning_rate=0.01
)
SIZE, GRID, STRIDE = (40, 48), (4, 5), 10


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"reference case {GOLDEN} is not beside the checkout")
    return {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("test_resnet", size=(64, 96), weights="random", layer=-1)


def random_images(N=1, size=SIZE):
    return F.interpolate(torch.randint(0, 256, (N, 3, 7, 5)).float(), size).to(torch.uint8)


def random_targets(schedule, N=1, k=4):
    """Of views that all show the same, of one colour: what a network learns in a few steps."""
    own = torch.randn(N, 1, k, 1, 1).expand(-1, -1, -1, *GRID)
    return own.expand(-1, schedule.views, -1, -1, -1), own.expand(-1, schedule.held_out, -1, -1, -1)


def random_networks(N=2, k=4, size=SIZE):
    networks, images = ImplicitNetworks(N, k), random_images(N, size)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    networks.look_at(images)
    return networks, images


# --- The network ---


@torch.inference_mode()
def test_golden_network(golden):
    low, span = colour_range(golden["image"])
    state = {name.removeprefix("state/"): tensor for name, tensor in golden.items() if name.startswith("state/")}
    fitted = FittedNetwork(state, low[0], span[0], 1.0)
    networks = ImplicitNetworks.stack([fitted])
    # Phases of the highest frequencies are large: an image that is off by a rounding is thousands of roundings away.
    (size,) = term_sizes(lambda image: [networks.render(image)], golden["image"])
    assert_close(networks.render(golden["image"]), golden["output"], 2.0**-23, size)
    folded = render_folded(networks, Waves.of(networks, golden["image"])).mT.reshape(golden["output"].shape)
    assert_close(folded, golden["output"], 1e-3)
    kept = networks.fitted(0, 2.5)
    assert kept.scale == 2.5
    assert all(torch.equal(kept.state[name], tensor) for name, tensor in state.items())


def test_golden_views_and_downsampler(golden):
    """The views' matrices, without the blur; an attention that is fixed."""
    names = ("t_zoom", "t_x", "t_y", "t_flip")  # published x counts rows
    jitters = [
        Jitter((48, 48), int(golden["pad"]), zoom.item(), int(row), int(column), bool(flip))
        for zoom, row, column, flip in zip(*(golden[name] for name in names), strict=True)
    ]
    windows = Windows.of(jitters, (5, 5), 9, torch.device("cpu"))
    blur = blur_matrix(48).float()
    views = blur @ golden["views"] @ blur.T
    simple = SimpleDownsampler(9)
    simple.kernel.data = golden["down_kernel"]
    kernel = golden["down_kernel"].abs() / golden["down_kernel"].abs().sum()
    pulled = torch.einsum("vias,ab,vjbt->vijst", windows.rows, kernel, windows.columns)
    rows, columns = windows.starts()
    cut = torch.stack([golden["output"][0, :, i : i + 14, j : j + 14] for i, j in zip(rows, columns, strict=True)])
    low = (pulled.flatten(0, 2)[:, None] * cut).sum((2, 3)).view(8, 5, 5, 16).movedim(3, 1)
    assert_close(low, simple(views, (5, 5)).detach(), 1e-5)
    rows, columns = windows.dense()
    patches = torch.einsum("vpr,crs,vqs->vcpq", rows, golden["output"][0], columns)
    assert_close(F.conv2d(patches.reshape(128, 1, 45, 45), kernel[None, None], stride=9).view_as(low), low, 1e-5)


@torch.inference_mode()
def test_networks_of_a_batch_are_those_of_one():
    networks, images = random_networks(3)
    for i in range(3):
        alone = ImplicitNetworks.stack([networks.fitted(i)])
        assert_close(alone.render(images[i : i + 1]), networks.render(images)[i : i + 1], 1e-6)


def test_folded_is_the_network():
    networks, images = random_networks()
    networks, keep = networks.double(), Dropout(torch.ones(CHANNELS), torch.ones(4))
    waves = Waves.of(networks, images, torch.float64)
    expected = networks.render(images).flatten(2).mT
    assert_close(render_folded(networks, waves), expected.detach(), 1e-9)
    assert_close(render_folded(networks, waves, keep), expected.detach(), 1e-9)
    given = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(networks.parameters()), given)
    folded = render_folded(networks, waves)

    def gradients(given):
        return torch.autograd.grad(folded, list(networks.parameters()), given, retain_graph=True)

    for gradient, expected_gradient, size in zip(gradients(given), wanted, term_sizes(gradients, given), strict=True):
        assert_close(gradient, expected_gradient, 1e-9, size)


def test_dropout_drops_channels_after_their_normalisation():
    networks, images = random_networks(1)
    networks = networks.double()
    dropout = Dropout((torch.rand(CHANNELS) > 0.2).double() / 0.8, torch.tensor([1.25, 0, 1.25, 1.25]).double())
    dropped = ImplicitNetworks(1, 4).double()
    dropped.load_state_dict(networks.state_dict())
    dropped.norm1_weight.data *= dropout.inputs
    dropped.norm1_bias.data *= dropout.inputs
    waves = Waves.of(networks, images, torch.float64)
    only_inputs = render_folded(networks, waves, Dropout(dropout.inputs, torch.ones(4))).detach()
    assert_close(only_inputs, render_folded(dropped, waves).detach(), 1e-9)
    assert not torch.allclose(render_folded(networks, waves, dropout), only_inputs)


@torch.inference_mode()
def test_rendering_at_another_size_shows_the_same():
    networks, images = random_networks(1)
    fast = torch.arange(CHANNELS - 3) % 150 >= 25  # beyond the pixels' resolution
    networks.conv1_weight[:, :, :-3][:, :, fast] = 0
    small = networks.render(images)
    large = networks.render(F.interpolate(images, scale_factor=2))
    assert large.shape == (1, 4, 80, 96)
    assert (large - F.interpolate(small, large.shape[2:])).square().mean() < 0.1 * small.var()
    with pytest.raises(ValueError, match="images: got"):
        networks.render(images.expand(2, -1, -1, -1))


@torch.inference_mode()
def test_a_fitted_network_is_kept_as_tensors():
    networks, images = random_networks(1)
    kept = FittedNetwork.from_tensors(networks.fitted(0, 0.5).tensors())
    assert kept.scale == 0.5
    assert torch.equal(ImplicitNetworks.stack([kept]).render(images), networks.render(images))
    tensors = kept.tensors()
    del tensors["4.bias"]
    with pytest.raises(JobError, match=r"4\.bias"):
        FittedNetwork.from_tensors(tensors)
    wrong = dataclasses.replace(kept, state={**kept.state, "8.bias": torch.zeros(5)})
    with pytest.raises(JobError, match=r"conv2_bias of shape \[1, 5\]"):
        ImplicitNetworks.stack([wrong])


# --- Views and downsampler ---


@pytest.mark.parametrize(
    ("size", "grid", "cell"), [((40, 48), (4, 5), 9), ((31, 23), (1, 3), 7), ((20, 20), (2, 2), 19)]
)
def test_windows_are_padding_enlarging_cropping_blurring_and_unfolding(size, grid, cell):
    jitters = sample_views(dataclasses.replace(SHORT, views=6), size)[0]
    maps = torch.randn(2, 5, *size)
    downsamplers = AttentionDownsamplers(2, 5, cell)
    for parameter in downsamplers.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    leaf = maps.flatten(2).mT.contiguous().requires_grad_()
    low = downsamplers(leaf, Windows.of(jitters, grid, cell, torch.device("cpu")))
    plain = maps.clone().requires_grad_()
    expected = []
    for image in range(2):
        alone = AttentionDownsamplers(1, 5, cell)
        for name, parameter in downsamplers.named_parameters():
            alone.get_parameter(name).data = parameter.data[image : image + 1]
        views = [plain_downsample(plain[image : image + 1], jitter, alone, grid) for jitter in jitters]
        expected.append(torch.cat(views).movedim(1, 3))
    wanted = torch.stack(expected)
    assert_close(low.detach(), wanted.detach(), 1e-4)
    given = torch.randn_like(wanted)
    [gradient] = torch.autograd.grad(low, leaf, given)
    [plain_gradient] = torch.autograd.grad(wanted, plain, given)
    assert_close(gradient, plain_gradient.flatten(2).mT, 1e-4)


def test_what_is_dropped_is_not_looked_at():
    downsamplers, maps = AttentionDownsamplers(1, 3, 9), torch.randn(1, 40 * 48, 3)
    windows = Windows.of(sample_views(SHORT, SIZE)[0][:2], GRID, 9, torch.device("cpu"))
    everything = DownsamplerDropout(torch.ones(2, 3), torch.ones(2, *GRID))
    assert_close(downsamplers(maps, windows, everything), downsamplers(maps, windows).detach(), 1e-6)
    nothing = [
        DownsamplerDropout(torch.ones(2, 3), torch.zeros(2, *GRID)),
        DownsamplerDropout(torch.zeros(2, 3), torch.ones(2, *GRID)),
    ]
    downsamplers.saliency_bias.data.zero_()
    assert_close(*(downsamplers(maps, windows, dropout).detach() for dropout in nothing), 1e-6)


def test_cells_must_fit():
    with pytest.raises(ValueError, match="cell_px: got 38 pixels for 4 cells, need at most 37"):
        Windows.of(sample_views(SHORT, SIZE)[0], GRID, 38, torch.device("cpu"))


# --- The objective ---


def test_the_loss_is_what_its_terms_say():
    high, low, targets = torch.randn(2, 6 * 7, 4), torch.randn(2, 3, 2, 2, 4), torch.randn(2, 3, 2, 2, 3)
    scales = torch.rand(2, 3, 2, 2) + 0.5
    published = LossWeights()
    losses = loss_of_images(high, low, targets, scales, (6, 7), published)
    for n in range(2):
        reconstruction = ((low[n, ..., 1:] - targets[n]) ** 2 / (2 * scales[n, ..., None] ** 2)).mean()
        wanted = targets[n].norm(dim=-1)
        magnitudes = ((low[n, ..., 0] - wanted) ** 2).mean() + ((low[n, ..., 1:].norm(dim=-1) - wanted) ** 2).mean()
        maps = high[n].view(6, 7, 4)
        variation = ((maps[1:, :, 0] - maps[:-1, :, 0]) ** 2).sum() + ((maps[:, 1:, 0] - maps[:, :-1, 0]) ** 2).sum()
        blurs = [blur_matrix(length).float() for length in (6, 7)]
        blurred = torch.einsum("ih,jw,hwc->ijc", *blurs, maps[..., 1:])
        total = reconstruction + scales[n].log().mean() + 0.001 * magnitudes + 0.05 * variation / 42
        total += 0.1 * (maps[..., 1:] - blurred).square().mean()
        torch.testing.assert_close(losses[n], total)


def test_a_magnitude_of_nothing_has_a_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    magnitude(features).sum().backward()
    assert torch.equal(features.grad, torch.zeros(2, 3))


# --- The fit ---


def test_gradients_reach_every_parameter():
    fitter = _Fitter(random_images(2), *random_targets(SHORT, 2), SHORT, STRIDE)
    fitter._loss().sum().backward()
    for name, parameter in fitter.model.named_parameters():
        assert parameter.grad.reshape(2, -1).abs().sum(1).gt(0).all(), name


def test_gradients_do_not_depend_on_the_batch():
    images, (targets, held) = random_images(2), random_targets(SHORT, 2)

    def gradients(images, targets, held, *parameters):
        fitter = _Fitter(images, targets, held, SHORT, STRIDE)
        for parameter, value in zip(fitter.model.parameters(), parameters or fitter.model.parameters(), strict=True):
            parameter.data = value.data
        fitter._loss().sum().backward()
        return [parameter.grad for parameter in fitter.model.parameters()]

    parameters = _Fitter(images[1:], targets[1:], held[1:], SHORT, STRIDE).model.parameters()
    sizes = term_sizes(partial(gradients, images[1:]), targets[1:], held[1:], *parameters)
    together, alone = gradients(images, targets, held), gradients(images[1:], targets[1:], held[1:])
    for one, two, size in zip(alone, together, sizes, strict=True):
        assert_close(one, two[1:], 5e-6, size)


def test_fitting_improves_and_does_not_depend_on_the_batch():
    images, (targets, held) = random_images(2), random_targets(SHORT, 2)
    looks = []
    schedule = dataclasses.replace(SHORT, steps=40, patience=None)
    together = fit_networks(
        images, targets, held, schedule, stride_px=STRIDE, on_check=lambda step, errors: looks.append((step, errors))
    )
    assert [step for step, _ in looks] == list(range(4, 41, 4))
    assert (looks[-1][1] < 0.9 * looks[0][1]).all()
    for i in range(2):
        part = slice(i, i + 1)
        alone = fit_networks(images[part], targets[part], held[part], schedule, stride_px=STRIDE)
        high = together.networks.render(images)[part]
        assert_close(alone.networks.render(images[part]), high.detach(), 1e-3)
        error = together.held_out_error[part]
        assert_close(alone.held_out_error, error, 2e-3, size=error)  # of squares; after 40 steps of rounding
    again = fit_networks(images, targets, held, schedule, stride_px=STRIDE)
    for name, tensor in again.networks.state_dict().items():
        assert torch.equal(tensor, together.networks.state_dict()[name])


def test_an_image_stops_where_its_held_out_views_get_worse(monkeypatch):
    course = {4: [3.0, 3.0], 8: [2.0, 2.0], 12: [2.5, 1.0], 16: [2.5, 0.5], 20: [1.0, 0.4], 24: [1.0, 0.6]}
    steps = iter(sorted(course))
    monkeypatch.setattr(_Fitter, "_held_out_errors", lambda self: torch.tensor(course[next(steps)]))
    images, (targets, held) = random_images(2), random_targets(SHORT, 2)
    held = held + 2  # explained badly by zeros
    schedule = dataclasses.replace(SHORT, steps=1000, patience=1)
    with pytest.raises(StopIteration):
        fit_networks(images, targets, held, dataclasses.replace(schedule, patience=3), stride_px=STRIDE)
    steps = iter(sorted(course))
    fit = fit_networks(images, targets, held, schedule, stride_px=STRIDE)
    assert fit.steps.tolist() == [8, 20]
    assert fit.held_out_error.tolist() == pytest.approx([2.0, 0.4])


def test_one_image_that_fails_leaves_the_others():
    images, (targets, held) = random_images(4), random_targets(SHORT, 4)
    images[1], targets = 77, targets.clone()
    targets[2, 3, 0, 1, 1] = torch.nan
    targets[3], held = targets[3] * 1e18, held.clone()
    fit = fit_networks(images, targets, held, SHORT, stride_px=STRIDE)
    alone = fit_networks(images[:1], targets[:1], held[:1], SHORT, stride_px=STRIDE)
    assert {i: error.status for i, error in fit.failures.items()} == {1: "constant", 2: "nonfinite", 3: "diverged"}
    assert {error.status for error in fit.failures.values()} < set(FAILED)
    assert f"no better than zeros after {SHORT.steps} steps" in str(fit.failures[3])
    assert_close(fit.networks.render(images)[:1].detach(), alone.networks.render(images[:1]).detach(), 1e-3)


def test_nothing_is_fitted_to_constant_images():
    images = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    for schedule in (SHORT, dataclasses.replace(SHORT, patience=None)):
        fit = fit_networks(images, *random_targets(SHORT), schedule, stride_px=STRIDE)
        assert fit.steps.tolist() == [0]
        assert fit.failures[0].status == "constant"


# --- The schedule, the upsampler ---


def test_schedules():
    assert (FAITHFUL.views, FAITHFUL.steps, FAITHFUL.views_per_step, FAITHFUL.learning_rate) == (3000, 1200, 10, 2e-3)
    assert FAITHFUL.cell(14) == FAITHFUL.cell(16) == 29
    assert Schedule.asked_for(views=3000, steps=1200) == FAITHFUL
    assert Schedule.asked_for(views=None, steps=7) == dataclasses.replace(DEFAULT, steps=7)
    few, many = (sample_views(dataclasses.replace(SHORT, views=n), SIZE) for n in (3, 9))
    assert few[1] == many[1]
    assert many[0][:3] == few[0]
    assert not set(map(repr, many[0])) & set(map(repr, many[1]))
    fitted, held = sample_views(dataclasses.replace(FAITHFUL, held_out=40), SIZE)
    assert (len(fitted), len(held)) == (3000, 40)
    assert not set(fitted) & set(held)
    for wrong in ({"views": 0}, {"patience": 0}, {"check_every": 0}, {"max_zoom": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(SHORT, **wrong)
    with pytest.raises(ValueError, match="--views 5 is for --upsampler multiview or implicit: got jbu"):
        UpsampleConfig(images="images", store="store", views=5)


def test_the_upsampler_fits_and_renders(backbone, monkeypatch):
    schedule = dataclasses.replace(SHORT, cell_px=12, steps=4, check_every=2)
    upsampler = ImplicitUpsampler(backbone, schedule).eval()
    C = backbone.num_chs
    images = random_images(3, backbone.size)
    images[1] = 9
    mean, components = torch.randn(C), torch.linalg.qr(torch.randn(C, C))[0][:4]
    with torch.inference_mode():  # as in workers
        features = backbone(images)
        projected = upsampler.with_basis(mean, components)
        high = projected(features, images, (50, 70))
        stored = projected.encode(features, images, (50, 70), Encoding(torch.full((4,), 0.1)))
        wide = projected(features[:1], images[:1], (50, 70))
    assert high.shape == (3, 4, 50, 70)
    assert high[[0, 2]].isfinite().all()
    assert high[1].isnan().all()
    assert stored.failures.keys() == {1}
    assert stored.failures[1].status == "constant"
    assert torch.equal(wide, high[:1])  # whoever is in the batch
    monkeypatch.setitem(upsample_implicit._IMAGES_AT_ONCE, "cpu", 2)  # as on a GPU
    assert_close(projected(features, images, (50, 70))[[0, 2]], high[[0, 2]], 1e-2)
    kept = projected.fitted(features, images)
    assert isinstance(kept[1], ImageError)
    again = ImplicitNetworks.stack([kept[0]]).render(F.interpolate(images[:1].float(), (50, 70), mode="bilinear"))
    assert_close(again.detach() * kept[0].scale, high[:1], 1e-3)
    with pytest.raises(ValueError, match=r"need the backbone's \(64, 96\)"):
        projected(features, random_images(3), (50, 70))


def test_the_upsampler_is_known_by_its_schedule(backbone):
    plain, other = (
        build_upsampler("implicit", None, backbone, ImplicitOptions(fit_steps=steps)) for steps in (None, 300)
    )
    identity = plain.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity != other.identity()
    assert identity["weights"] == {"magnitude": 0.001, "variation": 0.05, "blur": 0.1}
    with pytest.raises(JobError, match="has no weights"):
        build_upsampler("implicit", "weights.pth", backbone)
