import dataclasses
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.quantization import Encoding
from pipeline.errors import ImageError, JobError
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.implicit import upsampler as upsample_implicit
from pipeline.upsamplers.implicit.fit import _Fitter, fit_networks
from pipeline.upsamplers.implicit.network import ImplicitNetworks
from pipeline.upsamplers.implicit.schedule import DEFAULT, FAITHFUL, Schedule, sample_views
from pipeline.upsamplers.implicit.upsampler import ImplicitUpsampler
from schemas.index import FAILED
from schemas.options import UpsampleConfig
from schemas.upsamplers import ImplicitOptions
from tests.helpers.implicit import SHORT, SIZE, STRIDE, random_images, random_targets
from tests.helpers.rounding import assert_close, term_sizes

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
