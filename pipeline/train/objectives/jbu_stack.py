"""A JBU stack in training, whatever its objective."""

import torch
from torch import Tensor
from typing_extensions import override

from kernels.jbu import JBUStack
from pipeline.train.objectives.base import Objective
from pipeline.upsamplers.jbu import JBU

__all__ = ["StackObjective"]


class StackObjective(Objective):
    """An objective of the weights of ``jbu``.

    Args:
        stack: to be trained.
    """

    name = "jbu"
    mixed_precision = False  # colour distances lose precision; most time is spent in backbone and kernels

    def __init__(self, stack: JBUStack) -> None:
        super().__init__()
        self.upsampler = JBU(stack)
        self.upsampler.requires_grad_(True)

    @property
    def trained(self) -> JBU:
        """The upsampler with the weights to use."""
        return self.upsampler

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Create NAdam, as published."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.NAdam(trainable, lr=learning_rate)

    @override
    def upsample(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        return self.trained.forward_full(features, images, size)

    @override
    def weights(self) -> dict[str, Tensor]:
        assert self.trained.stack is not None
        return {name: tensor.detach().cpu().clone() for name, tensor in self.trained.stack.state_dict().items()}

    @override
    def metadata(self) -> dict[str, str]:
        """Return whether there is a final convolution, which ties the weights to one backbone."""
        assert self.trained.stack is not None
        return {"final": "off" if self.trained.stack.final is None else "on"}
