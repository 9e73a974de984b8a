"""Interface of training objectives, and statistics of features."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.train.data import Draw

__all__ = ["LOSS", "FeatureSample", "FeatureStatistics", "Objective"]

LOSS = "loss"


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of a backbone's features over sampled training images, which make losses comparable across backbones.

    Attributes:
        mean: [C] float32.
        deviation: [] float32, square root of the channels' mean variance.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of features [B, C, h, w]."""
        by_channel = features.double().transpose(0, 1).flatten(1)
        deviation = by_channel.var(1, correction=0).mean().sqrt()
        # Constant features have no scale; any value works.
        return cls(by_channel.mean(1).float(), deviation.float() if deviation > 0 else torch.ones(()))


@dataclass(frozen=True, eq=False)
class FeatureSample:
    """Sampled training images, and a backbone's features of them.

    Attributes:
        images: uint8 [n, 3, H, W].
        features: float32 [n, C, h, w].
    """

    images: Tensor
    features: Tensor

    @property
    def statistics(self) -> FeatureStatistics:
        """Statistics of the features."""
        return FeatureStatistics.of(self.features)


class Objective(nn.Module):
    """An upsampler and everything trained with it. Its ``forward`` computes the losses, so that DDP can wrap it.

    Attributes:
        name: name of the upsampler.
        mixed_precision: whether ``forward`` may run in bfloat16 autocast on a GPU; losses are float32 even then.
        has_heads: whether each backbone has parameters of its own, which steps on others do not use.
    """

    name: ClassVar[str]
    mixed_precision: ClassVar[bool]
    has_heads: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, turn: int, images: Tensor, draw: Draw) -> Any:
        """Compute the inputs of a batch's losses that need no gradients: random views and their features.

        Args:
            turn: index of the backbone to train on.
            images: uint8 [B, 3, H, W], on the device.
            draw: the step's random numbers.
        """

    @abstractmethod
    def forward(self, prepared: Any) -> dict[str, Tensor]:
        """Compute losses by name, each []; `LOSS` is minimised, the others are its parts, for the record."""

    @abstractmethod
    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Create the published optimizer, for all trainable parameters."""

    def after_step(self) -> None:
        """Hook after each optimizer step, for example to average parameters."""

    @abstractmethod
    def upsample(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample all C channels as the main job would with the current weights: [B, C, h, w] -> [B, C, *size]."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the upsampler's own tensors under their published names, on the CPU."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """Return metadata needed to use the weights, besides the backbones."""
