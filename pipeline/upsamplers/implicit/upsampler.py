"""FeatUp's implicit upsampler: compute views, fit a network to each image of the batch, render features."""

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from densefeat.torch.bilateral import resize
from kernels.quantization import Encoding
from pipeline.errors import ImageError
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.checks import check_images, checked_basis
from pipeline.upsamplers.images import one_colour
from pipeline.upsamplers.implicit.fit import Fit, fit_networks
from pipeline.upsamplers.implicit.network import FittedNetwork
from pipeline.upsamplers.implicit.schedule import DEFAULT, Schedule, sample_views
from pipeline.upsamplers.interface import Facts, Projected, Stored, Upsampler, with_nonfinite
from pipeline.views.features import JitterMatrices, view_features
from pipeline.views.jitter import Jitter
from schemas.upsamplers import ImplicitOptions

__all__ = ["ImplicitProjected", "ImplicitUpsampler"]

# On a CPU batching gains nothing, and a single fit can stop early. On a GPU a single image leaves it idle.
_IMAGES_AT_ONCE = {"cpu": 1, "cuda": 32}
_VIEWS_AT_ONCE = 64  # views whose matrices are built at a time: 26 MB at 224 px


class ImplicitUpsampler(Upsampler):
    """FeatUp's implicit upsampler (arXiv 2403.10516, section 3.2): a network for each image, fitted to its views.

    Differs from the published method where a dataset requires it: components are the dataset's, not the image's;
    features are scaled by one number per image to unit mean square over channels, instead of being normalised at each
    location, so that the scale can be undone; dropout of the saliency's input is per channel.

    Args:
        backbone: whose features are upsampled; shared, not copied.
        schedule: how networks are fitted.
    """

    name = "implicit"
    facts = Facts(
        weights="none",
        channels="any",
        scale="any: the network is evaluated at each pixel",
        guidance="the image, and the backbone's features of jittered views of it",
        pca="applied first: the network is fitted to k components",
    )

    def __init__(self, backbone: Backbone, schedule: Schedule = DEFAULT) -> None:
        super().__init__()
        self.backbone, self.schedule = backbone, schedule

    @classmethod
    @override
    def from_options(cls, options: ImplicitOptions, weights: str | None, backbone: Backbone) -> "ImplicitUpsampler":
        return cls(backbone, Schedule.asked_for(views=options.views, steps=options.fit_steps))

    @override
    def identity(self) -> dict[str, object]:
        return {"name": self.name, **self.schedule.identity()}

    @override
    def explain(self, device: torch.device) -> str:
        return "plain torch and numba" if device.type == "cpu" else "plain torch, bfloat16"

    @override
    def with_basis(self, mean: Tensor, components: Tensor) -> "ImplicitProjected":
        mean, components = checked_basis(mean, components)
        return ImplicitProjected(self.backbone, self.schedule, mean.float(), components.float())


class ImplicitProjected(Projected):
    """The upsampler with a PCA basis.

    Args:
        backbone: the upsampler's backbone.
        schedule: the upsampler's schedule.
        mean: [C] float32.
        components: [k, C] float32.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, backbone: Backbone, schedule: Schedule, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.backbone, self.schedule = backbone, schedule
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    @override
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        return self._rendered(features, images, size)[0]

    @override
    def encode(self, features: Tensor, images: Tensor, size: tuple[int, int], encoding: Encoding) -> Stored:
        high, failures = self._rendered(features, images, size)
        return with_nonfinite(encoding.encode(high), failures)

    def fitted(self, features: Tensor, images: Tensor) -> list[FittedNetwork | ImageError]:
        """Fit a network to each image, to store instead of its features.

        Args:
            features: [B, C, h, w] float32, as the backbone returns them.
            images: [B, 3, H, W] uint8 RGB, of the backbone's size.

        Returns:
            For each image its network, or the error that explains why there is none.

        Raises:
            ValueError: an argument is not as above.
        """
        fits = self._fits(features, images)
        return [
            fit.failures[i] if i in fit.failures else fit.networks.fitted(i, float(scale))
            for _, fit, scales in fits
            for i, scale in enumerate(scales)
        ]

    def _rendered(
        self, features: Tensor, images: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, dict[int, ImageError]]:
        """Features [B, k, *size] float32, NaN for failed images; and the failures."""
        check_images(features, images, size)
        high = torch.full((len(images), len(self.components), *size), torch.nan, device=images.device)
        failures = {}
        for first, fit, scales in self._fits(features, images):
            part = images[first : first + len(scales)]
            with torch.no_grad():
                rendered = fit.networks.render(resize(part.float(), size)) * scales[:, None, None, None]
            for i in range(len(part)):
                if i in fit.failures:
                    failures[first + i] = fit.failures[i]
                else:
                    high[first + i] = rendered[i]
        return high, failures

    def _fits(self, features: Tensor, images: Tensor) -> Iterator[tuple[int, Fit, Tensor]]:
        """Fit in batches; yield the index of the first image, the fit, and the scale of each network's output."""
        check_images(features, images, (1, 1))
        if tuple(images.shape[2:]) != self.backbone.size:
            raise ValueError(f"images: got {list(images.shape[2:])} pixels, need the backbone's {self.backbone.size}")
        at_once = _IMAGES_AT_ONCE[images.device.type]
        for first in range(0, len(images), at_once):
            part = slice(first, first + at_once)
            yield first, *self._fit(features[part], images[part])

    def _fit(self, features: Tensor, images: Tensor) -> tuple[Fit, Tensor]:
        scales = features.square().mean((1, 2, 3)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        targets, held_out = (
            self._seen(images, jitters) / scales[:, None, None, None, None]
            for jitters in sample_views(self.schedule, self.backbone.size)
        )
        fit = fit_networks(images, targets, held_out, self.schedule, stride_px=self.backbone.reduction)
        return fit, scales

    def _seen(self, images: Tensor, jitters: list[Jitter]) -> Tensor:
        """The backbone's features of views, [B, V, k, h, w] float32; zeros if every image has a single colour."""
        if one_colour(images).all():
            return images.new_zeros(
                len(images), len(jitters), len(self.components), *self.backbone.grid, dtype=torch.float32
            )
        projection = self.mean, self.components
        parts = [
            view_features(
                self.backbone, images, JitterMatrices.of(jitters[i : i + _VIEWS_AT_ONCE], images.device), projection
            )
            for i in range(0, len(jitters), _VIEWS_AT_ONCE)
        ]
        return torch.cat(parts, 1)
