import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.upsamplers.implicit_featup import plain_downsample
from pipeline.errors import JobError
from pipeline.upsamplers.implicit.downsample import AttentionDownsamplers, DownsamplerDropout, Windows
from pipeline.upsamplers.implicit.folded import Dropout, Waves, render_folded
from pipeline.upsamplers.implicit.loss import LossWeights, loss_of_images, magnitude
from pipeline.upsamplers.implicit.network import CHANNELS, FittedNetwork, ImplicitNetworks, colour_range
from pipeline.upsamplers.implicit.schedule import sample_views
from pipeline.views.downsample import SimpleDownsampler, blur_matrix
from pipeline.views.jitter import Jitter
from tests.helpers.implicit import GRID, SHORT, SIZE, random_networks
from tests.helpers.rounding import assert_close, term_sizes

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
