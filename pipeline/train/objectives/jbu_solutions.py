"""Training joint bilateral upsampling to copy multiview's solutions (`pipeline.upsamplers.multiview`) in one pass.

A solution explains several views of its image, and is sharp where they are; it is a target for every pixel. FeatUp's
consistency with views (`pipeline.train.objectives.jbu_views`) leaves open which of the many features that explain a
view are meant. Errors between neighbouring pixels count as well as those of pixels: with the latter alone, a blur is
nearly as good. The kernels should sum to 1: features are centred here, but not where the weights are used.

As all of a stack treats every channel alike, a step upsamples random directions of the components.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from kernels.jbu import JBUStack
from pipeline.train.data import Draw
from pipeline.train.objectives.averaging import averaged_copy
from pipeline.train.objectives.base import LOSS
from pipeline.train.objectives.feature_cache import FeatureCache
from pipeline.train.objectives.jbu_initial import begin_as_bilateral
from pipeline.train.objectives.jbu_stack import StackObjective
from pipeline.train.objectives.solutions import Solutions
from pipeline.upsamplers.jbu import JBU
from schemas.train_options import TrainConfig

__all__ = ["JBUSolutionsObjective"]

_EDGES = 10.0  # weight of errors between neighbours: their squares are about a tenth of those of pixels
_SUM = 4.0  # weight of errors of the kernels' sums


@dataclass(frozen=True, eq=False)
class _Prepared:
    images: Tensor  # [B, 3, H, W] uint8
    low: Tensor  # [B, d, h, w], in random directions
    target: Tensor  # [B, d, H, W]
    weights: Tensor  # [B], of the images' errors: over the target's variance and the number of images; 0: no solution


class JBUSolutionsObjective(StackObjective):
    """A JBU stack without final convolution, which begins at the training-free kernels.

    Args:
        config: the job's options.
        solutions: of the backbones to train on.
        caches: of each backbone's solutions, which are the same in every epoch.
        sample: training images, [n, 3, H, W] uint8, on the CPU, to fit the initial kernels to; None: a checkpoint
            will be loaded.
    """

    def __init__(
        self, config: TrainConfig, solutions: Sequence[Solutions], caches: Sequence[FeatureCache], sample: Tensor | None
    ) -> None:
        stack = JBUStack(None)
        if sample is not None:
            begin_as_bilateral(stack, sample)
        super().__init__(stack)
        self._directions, self._solutions, self._caches = config.projection_chs, tuple(solutions), tuple(caches)
        self.averaged = averaged_copy(self.upsampler)

    @property
    @override
    def trained(self) -> JBU:
        upsampler = self.averaged.module
        assert isinstance(upsampler, JBU)
        return upsampler

    @override
    def after_step(self) -> None:
        self.averaged.update_parameters(self.upsampler)

    @override
    def prepare(self, turn: int, images: Tensor, draw: Draw) -> _Prepared:
        """Solve for the images' features, unless they are kept; draw directions, and whether to flip the batch."""
        solutions = self._solutions[turn]
        # One by one, because in later epochs a batch has images that were solved before, and others.
        own = [self._caches[turn].features(one, functools.partial(solutions.solve, one)) for one in images[:, None]]
        low, solved = (torch.cat(tensors) for tensors in zip(*own, strict=True))
        target = solutions.finish(solved, images)
        variance = target.var((2, 3)).sum(1)
        usable = variance.isfinite() & (variance > 0)
        k = low.shape[1]
        directions = torch.linalg.qr(torch.randn(k, min(k, self._directions), generator=draw.torch))[0].to(low)
        low, target = (
            torch.einsum("bkhw,kd->bdhw", torch.where(usable[:, None, None, None], one, 0), directions)
            for one in (low, target)
        )
        if torch.rand((), generator=draw.torch) < 0.5:
            images, low, target = images.flip(3), low.flip(3), target.flip(3)
        weights = k / directions.shape[1] / variance / usable.sum()
        return _Prepared(images, low, target, torch.where(usable, weights, 0))

    @override
    def forward(self, prepared: _Prepared) -> dict[str, Tensor]:
        low = torch.cat([prepared.low, torch.ones_like(prepared.low[:, :1])], 1)
        size = (prepared.target.shape[2], prepared.target.shape[3])
        high = self.upsampler(low, prepared.images, size)
        difference = high[:, :-1] - prepared.target
        between = _squared(difference.diff(dim=2)) + _squared(difference.diff(dim=3))
        error, edges = (prepared.weights @ one for one in (_squared(difference), between))
        sums = (high[:, -1] - 1).square().mean()
        return {LOSS: error + _EDGES * edges + _SUM * sums, "error": error, "edges": edges, "sums": sums}


def _squared(difference: Tensor) -> Tensor:
    """Squared length over channels, mean over pixels: [B, d, H, W] -> [B]."""
    return difference.square().sum(1).mean((1, 2))
