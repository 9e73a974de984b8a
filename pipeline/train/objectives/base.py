"""What every upsampler that can be trained has in common."""

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
    """Of a backbone's features over a sample of the training images, for losses of about the same size everywhere.

    Attributes:
        mean: [C] float32.
        deviation: [] float32, root of the mean variance of the channels.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Those of [B, C, h, w]."""
        by_channel = features.double().transpose(0, 1).flatten(1)
        deviation = by_channel.var(1, correction=0).mean().sqrt()
        # A constant has no scale; any will do.
        return cls(by_channel.mean(1).float(), deviation.float() if deviation > 0 else torch.ones(()))


@dataclass(frozen=True, eq=False)
class FeatureSample:
    """Some of the training images, and a backbone's features of them.

    Attributes:
        images: uint8 [n, 3, H, W].
        features: float32 [n, C, h, w].
    """

    images: Tensor
    features: Tensor

    @property
    def statistics(self) -> FeatureStatistics:
        """Of the features."""
        return FeatureStatistics.of(self.features)


class Objective(nn.Module):
    """An upsampler and whatever else is trained with it. Its ``forward`` makes the losses, so that DDP can wrap it.

    Attributes:
        name: of the upsampler.
        mixed_precision: whether ``forward`` may run in bfloat16 autocast on a GPU; losses come out in float32 even so.
    """

    name: ClassVar[str]
    mixed_precision: ClassVar[bool]

    @abstractmethod
    def prepare(self, turn: int, images: Tensor, draw: Draw) -> Any:
        """Make what the losses of a batch need and have no gradient for: random views, and their features.

        Args:
            turn: index of the backbone to train on.
            images: uint8 [B, 3, H, W], on the device.
            draw: the step's random numbers.
        """

    @abstractmethod
    def forward(self, prepared: Any) -> dict[str, Tensor]:
        """Losses by name, each []; `LOSS` is what is minimised, the others are its parts, for the record."""

    @abstractmethod
    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """The published one, of all trainable parameters."""

    def after_step(self) -> None:
        """Note what an optimizer's step has made of the parameters."""

    @abstractmethod
    def upsample(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample as the main job would with the weights as they are: [B, C, h, w] -> [B, C, *size], C unprojected."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The upsampler's own tensors under their published names, on the CPU."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """What one has to know of the weights to use them, beside the backbones."""
