"""The average of a network's recent weights: less noisy than the last ones, without a schedule of learning rates."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["MEMORY", "averaged_copy"]

MEMORY = 0.98  # of running averages: about 50 steps


def averaged_copy(network: nn.Module) -> AveragedModel:
    """A copy of a network, frozen and in evaluation mode; ``update_parameters(network)`` after each step averages."""
    copy = AveragedModel(network, avg_fn=_averaged, use_buffers=True)
    return copy.requires_grad_(False).eval()


def _averaged(average: Tensor, latest: Tensor, steps: Tensor | int) -> Tensor:
    """Average over about the last ninth of the steps, as early weights are poor, and over at most about 50."""
    return average + (latest - average) * max(1 - MEMORY, 1 / (1 + float(steps) / 9))
