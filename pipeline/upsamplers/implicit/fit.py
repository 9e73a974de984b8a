"""Fit FeatUp's implicit networks for many images at once, each to its own image's views.

Random numbers come from the schedule's seed and are the same for every image: the views, which of them a step uses,
dropout, and initial parameters. An image's result depends only on the image and the schedule.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import ImageError
from pipeline.upsamplers.images import one_colour, one_colour_error
from pipeline.upsamplers.implicit.downsample import AttentionDownsamplers, DownsamplerDropout, Windows
from pipeline.upsamplers.implicit.folded import Dropout, Waves, render_folded
from pipeline.upsamplers.implicit.loss import Uncertainty, loss_of_images, magnitude
from pipeline.upsamplers.implicit.network import CHANNELS, ImplicitNetworks
from pipeline.upsamplers.implicit.schedule import DEFAULT, Schedule, sample_views

__all__ = ["Fit", "fit_networks"]

_DROPPED = 0.2  # published: share of dropped channels, and of cells whose saliency is dropped
_ROUNDING = 1e-6  # minimum relative improvement of the held-out error that counts


@dataclass(frozen=True)
class Fit:
    """Fitted networks of N images.

    Attributes:
        networks: for each image, the network that the schedule keeps.
        downsamplers: likewise.
        held_out_error: [N] float32, mean squared error of the kept networks on the held-out views.
        steps: [N] int64, number of steps after which the kept networks were taken.
        failures: index of an image -> why its network is unusable.
    """

    networks: ImplicitNetworks
    downsamplers: AttentionDownsamplers
    held_out_error: Tensor
    steps: Tensor
    failures: dict[int, ImageError]


class _Model(nn.Module):
    """All modules fitted for N images."""

    def __init__(self, images: int, num_chs: int, cell_px: int, seed: int) -> None:
        super().__init__()
        self.networks = ImplicitNetworks(images, num_chs, seed=seed)
        self.downsamplers = AttentionDownsamplers(images, num_chs + 1, cell_px, seed=seed)
        self.uncertainty = Uncertainty(images, num_chs, seed=seed)


def fit_networks(
    images: Tensor,
    targets: Tensor,
    held_out_targets: Tensor,
    schedule: Schedule = DEFAULT,
    *,
    stride_px: int,
    on_check: Callable[[int, Tensor], None] | None = None,
) -> Fit:
    """Fit a network to each image; on a GPU in bfloat16 where that is safe, on a CPU in float32.

    Args:
        images: [N, 3, H, W] uint8 RGB.
        targets: [N, V, k, h, w] floating, on the images' device: features of the views to fit (`sample_views`), with
            about unit variance per channel of the backbone.
        held_out_targets: [N, V', k, h, w], features of the held-out views.
        schedule: how to fit.
        stride_px: the backbone's stride in pixels.
        on_check: called with the step and the held-out errors [N] at every check.

    Returns:
        The networks, and which of them failed. No image's network depends on another image.

    Raises:
        ValueError: the numbers of views differ from the schedule's, or the image is too small for the downsampler.
    """
    if (targets.shape[1], held_out_targets.shape[1]) != (schedule.views, schedule.held_out):
        got = f"{targets.shape[1]} and {held_out_targets.shape[1]}"
        raise ValueError(f"targets: got {got} views, need the schedule's {schedule.views} and {schedule.held_out}")
    with torch.inference_mode(False), torch.enable_grad():
        fitter = _Fitter(images, targets.clone(), held_out_targets.clone(), schedule, stride_px)
        return fitter.run(on_check)


class _Fitter:
    """The optimisation loop and its state."""

    def __init__(self, images: Tensor, targets: Tensor, held_out: Tensor, schedule: Schedule, stride_px: int) -> None:
        self.schedule, self.size = schedule, (images.shape[2], images.shape[3])
        N, _, self.k = targets.shape[:3]
        grid, cell = (targets.shape[3], targets.shape[4]), schedule.cell(stride_px)
        self.windows, self.held_windows = _windows(schedule, self.size, grid, cell, images.device)
        self.targets, self.held_targets = (t.movedim(2, 4).float() for t in (targets, held_out))  # [N, V, h, w, k]
        self.model = _Model(N, self.k, cell, schedule.seed).to(images.device)
        self.model.networks.look_at(images)
        self.mixed = images.is_cuda
        self.waves = Waves.of(self.model.networks, images, torch.bfloat16 if self.mixed else torch.float32)
        self.failures = _unusable(images, self.targets, self.held_targets)
        self.generator = torch.Generator().manual_seed(schedule.seed)

    def run(self, on_check: Callable[[int, Tensor], None] | None) -> Fit:
        """Run the schedule's steps and return the kept networks."""
        best = _BestWeights(self.model, self.schedule, self.failures)
        optimizer = torch.optim.NAdam(self.model.parameters(), lr=self.schedule.learning_rate)
        for step in range(1, self.schedule.steps + 1):
            if best.finished:
                break
            optimizer.zero_grad()
            torch.autograd.backward(self._loss().sum())  # gradients of different images are independent
            optimizer.step()
            if step % self.schedule.check_every == 0 or step == self.schedule.steps:
                errors = self._held_out_errors()
                best.update(step, errors)
                if on_check is not None:
                    on_check(step, errors)
        best.restore()
        self._find_divergence(best)
        return Fit(self.model.networks, self.model.downsamplers, best.error, best.step, self.failures)

    def _loss(self) -> Tensor:
        """Loss [N] on randomly chosen views."""
        chosen = torch.randint(self.schedule.views, (self.schedule.views_per_step,), generator=self.generator)
        high = self._render(Dropout(self._kept(CHANNELS), self._kept(self.k)))
        windows = self.windows[chosen.to(high.device)]
        cells = (*windows.first_row.shape, windows.first_column.shape[1])
        dropout = DownsamplerDropout(self._kept(len(chosen), self.k + 1), (self._kept(*cells) > 0).float())
        low = self.model.downsamplers(high, windows, dropout)
        targets = self.targets[:, chosen.to(high.device)]
        scales = self.model.uncertainty(targets)
        return loss_of_images(high, low, targets, scales, self.size, self.schedule.weights)

    def _render(self, dropout: Dropout | None = None) -> Tensor:
        """Render magnitude and features: [N, H·W, 1 + k] float32."""
        with torch.autocast(self.waves.once.device.type, torch.bfloat16, enabled=self.mixed):
            features = render_folded(self.model.networks, self.waves, dropout).float()
        return torch.cat([magnitude(features)[..., None], features], 2)

    @torch.no_grad()
    def _held_out_errors(self) -> Tensor:
        """Mean squared error [N] on the held-out views."""
        high = self._render()
        squares = [
            (self.model.downsamplers(high, self.held_windows[part])[..., 1:] - self.held_targets[:, part]).square()
            for part in _parts(self.schedule.held_out, self.schedule.views_per_step)
        ]
        return torch.cat(squares, 1).flatten(1).mean(1)

    def _kept(self, *shape: int) -> Tensor:
        """Dropout factors, 0 or 1 / (1 - share); drawn on the CPU, so they are the same on every device."""
        kept = (torch.rand(*shape, generator=self.generator) > _DROPPED).float() / (1 - _DROPPED)
        return kept.to(self.waves.once.device)

    def _find_divergence(self, best: "_BestWeights") -> None:
        """Record networks no better than zeros on the held-out views: they diverged or had too few steps."""
        of_zeros = self.held_targets.square().flatten(1).mean(1)
        rows = zip(best.error.tolist(), of_zeros.tolist(), best.checked.tolist(), strict=True)
        for image, (error, limit, steps) in enumerate(rows):
            if not error < limit:
                message = (
                    f"its fit is no better than zeros after {steps} steps: squared error {error:.3g} on held-out "
                    f"views, {limit:.3g} for zeros"
                )
                self.failures.setdefault(image, ImageError("diverged", message))


class _BestWeights:
    """The parameters to keep for each image: the best on held-out views, or the last if patience is None.

    Attributes:
        error: [N] held-out error of the kept parameters.
        step: [N] step at which they were taken.
        checked: [N] step of the last check while the image's fit was still running.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, failures: dict[int, ImageError]) -> None:
        parameters = dict(model.named_parameters())
        first = next(iter(parameters.values()))
        self.parameters, self.patience = parameters, schedule.patience
        self.best = {name: p.detach().clone() for name, p in parameters.items()}
        self.error = torch.full((len(first),), torch.inf, device=first.device)
        self.step = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        self.checked = torch.zeros_like(self.step)
        self.waited = torch.zeros_like(self.step)
        self.running = torch.ones(len(first), dtype=torch.bool, device=first.device)
        self.running[list(failures)] = False

    @property
    def finished(self) -> bool:
        """Whether the fits of all images have ended."""
        return not self.running.any()

    @torch.no_grad()
    def update(self, step: int, errors: Tensor) -> None:
        """Store the parameters of images whose held-out error has fallen, unless their fit has ended."""
        better = self.running.clone()
        self.checked = torch.where(self.running, step, self.checked)
        if self.patience is not None:
            better &= errors < (1 - _ROUNDING) * self.error
            self.waited = torch.where(better, 0, self.waited + 1)
            self.running &= self.waited < self.patience
        for name, parameter in self.parameters.items():
            mask = better.view(-1, *[1] * (parameter.ndim - 1))
            self.best[name] = torch.where(mask, parameter, self.best[name])
        self.error = torch.where(better, errors, self.error)
        self.step = torch.where(better, step, self.step)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the kept parameters into the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])


@functools.lru_cache(2)  # the same for all images of a job, and takes seconds to compute
def _windows(
    schedule: Schedule, size: tuple[int, int], grid: tuple[int, int], cell_px: int, device: torch.device
) -> tuple[Windows, Windows]:
    """Windows of the views to fit, and of the held-out views."""
    fitted, held = sample_views(schedule, size)
    return Windows.of(fitted, grid, cell_px, device), Windows.of(held, grid, cell_px, device)


def _unusable(images: Tensor, *targets: Tensor) -> dict[int, ImageError]:
    """Images that cannot be fitted, with the reason."""
    failures: dict[int, ImageError] = {}
    constant = one_colour(images)
    finite = torch.stack([t.flatten(1).isfinite().all(1) for t in targets]).all(0)
    for image in range(len(images)):
        if constant[image]:
            failures[image] = one_colour_error()
        elif not finite[image]:
            failures[image] = ImageError("nonfinite", "the features of its views contain NaN or infinity")
    return failures


def _parts(count: int, most: int) -> Iterator[slice]:
    """Split ``range(count)`` into slices of at most ``most``."""
    return (slice(first, min(first + most, count)) for first in range(0, count, most))
