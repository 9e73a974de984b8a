"""Training LiFT: upsampled features of a small image should equal the features of the image at twice the size.

Suri et al. (arXiv 2403.14625, section 3.3): cosine distance at two octaves, from random weights. The defaults here
differ, to lower the error on held-out views after a short training: weights start as interpolation
(`begin_as_interpolation`), the loss is the squared error, only the octave that LiFT will be used on is trained, and a
consistency term compares upsampled features, averaged over each cell, with their low-res input. The average of the
weights over recent steps is measured and saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from densefeat.torch.bilateral import resize
from pipeline.features.backbone import Backbone
from pipeline.train.data import Draw
from pipeline.train.objectives.averaging import MEMORY, averaged_copy
from pipeline.train.objectives.base import LOSS, FeatureSample, Objective
from pipeline.train.objectives.feature_cache import FeatureCache
from pipeline.train.objectives.lift_initial import begin_as_interpolation
from pipeline.train.objectives.losses import cosine_distance
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.lift.network import LiFT
from schemas.train_options import TrainConfig

__all__ = ["AT_SIZE", "LiFTObjective", "lift_scales"]

AT_SIZE = 1  # index of --size in `lift_scales`


def lift_scales(octaves: int) -> tuple[float, ...]:
    """Image sizes for training, as multiples of --size: the target (2), the size LiFT will be used at (1), ½, ….

    The published code calls the largest size 1.
    """
    return tuple(2.0 ** (1 - scale) for scale in range(octaves + 1))


@dataclass(frozen=True, eq=False)
class _Octave:
    image: Tensor  # [B, 3, H, W] float32, normalised
    low: Tensor  # [B, C, h, w], its features
    target: Tensor  # [B, C, 2h, 2w], features of the same image at twice the size


class LiFTObjective(Objective):
    """LiFT, for one backbone and layer.

    The cosine distance does not determine the length of the output. Lengths matter when features are centred and
    projected on a basis, as in the main job. So with this loss the last convolution is scaled to the targets' length,
    by least squares over recent steps, which changes no cosine.

    Args:
        config: the job's options.
        backbones: one backbone, built for each of `lift_scales`, on the device.
        sample: sample of its features.
        cache: cache of features, which are the same in every epoch.
    """

    name = "lift"
    mixed_precision = True
    predicted_on_target: Tensor
    predicted_squared: Tensor

    def __init__(
        self, config: TrainConfig, backbones: Sequence[Backbone], sample: FeatureSample, cache: FeatureCache
    ) -> None:
        super().__init__()
        self._config, self._backbones, self._cache = config, tuple(backbones), cache
        self._variance = float(sample.statistics.deviation) ** 2
        self.lift = LiFT(backbones[AT_SIZE].num_chs, backbones[AT_SIZE].reduction)
        if config.lift_initial == "interpolation":
            begin_as_interpolation(self.lift, sample.features.cpu(), imagenet_normalised(sample.images.cpu()))
        self.averaged = averaged_copy(self.lift)
        for name in ("predicted_on_target", "predicted_squared"):
            self.register_buffer(name, torch.zeros(()))

    @override
    def prepare(self, turn: int, images: Tensor, draw: Draw) -> list[_Octave]:
        """Compute all octaves from ``images``, which have twice the size LiFT will be used at. Nothing is random."""
        scales = [images, *(_halved(images, 2**octave) for octave in range(1, len(self._backbones)))]
        features = self._cache.features(
            images, lambda: [backbone(scale) for backbone, scale in zip(self._backbones, scales, strict=True)]
        )
        return [
            _Octave(imagenet_normalised(scales[octave + 1]), features[octave + 1], features[octave])
            for octave in range(self._config.lift_octaves)
        ]

    @override
    def forward(self, prepared: list[_Octave]) -> dict[str, Tensor]:
        octaves, coarse = [], []
        for octave in prepared:
            predicted = self.lift(octave.low, octave.image).float()  # may be bfloat16 under autocast
            octaves.append(self._error(predicted, octave.target))
            coarse.append(self._error(F.avg_pool2d(predicted, 2), octave.low))
            if self._config.lift_loss == "cosine":
                self._note_scale(predicted.detach(), octave.target)
        error, consistency = torch.stack(octaves).sum(), torch.stack(coarse).sum()
        parts = {f"octave_{number}": octave for number, octave in enumerate(octaves, start=1)}
        return {LOSS: error + self._config.lift_consistency * consistency, **parts, "consistency": consistency}

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Create Adam, as published."""
        return torch.optim.Adam(self.lift.parameters(), lr=learning_rate)

    @override
    def after_step(self) -> None:
        self.averaged.update_parameters(self.lift)

    @override
    def upsample(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample ×2, then bilinearly."""
        return resize(self._scale() * self.averaged(features, imagenet_normalised(images)), size)

    @override
    def weights(self) -> dict[str, Tensor]:
        scaled = ("outc.weight", "outc.bias")
        return {
            name: tensor.detach().cpu() * (self._scale().cpu() if name in scaled else 1)
            for name, tensor in self.averaged.module.state_dict().items()
        }

    @override
    def metadata(self) -> dict[str, str]:
        """Return the pixels per cell, which the tensors do not determine."""
        return {"patch": str(self.lift.patch)}

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        if self._config.lift_loss == "cosine":
            return cosine_distance(predicted, target)
        return (predicted - target).square().mean() / self._variance

    def _note_scale(self, predicted: Tensor, target: Tensor) -> None:
        for mean, value in (
            (self.predicted_on_target, (predicted * target).mean()),
            (self.predicted_squared, predicted.square().mean()),
        ):
            mean.mul_(MEMORY).add_((1 - MEMORY) * value)

    def _scale(self) -> Tensor:
        """Positive factor [] on the output.

        It is 1 if the loss trains lengths, before the first step, and while predictions do not correlate positively
        with targets, where the least-squares factor would flip their sign.
        """
        if not (self.predicted_squared > 0 and self.predicted_on_target > 0):
            return torch.ones_like(self.predicted_squared)
        return self.predicted_on_target / self.predicted_squared


def _halved(images: Tensor, times: int) -> Tensor:
    """Shrink images [B, 3, H, W] uint8 to 1 / ``times`` of their size: the rounded mean over squares of pixels."""
    return F.avg_pool2d(images.float(), times).round().to(torch.uint8)
