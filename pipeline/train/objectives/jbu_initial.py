"""Initial weights for JBU: the training-free kernels, as closely as products of keys can express them."""

import itertools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.jbu import JBUStack, bilateral_kernel, learned_kernel
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.jbu import NARROW

__all__ = ["begin_as_bilateral"]

logger = logging.getLogger(__name__)

_STEPS, _LEARNING_RATE = 300, 5e-3
_CROP, _STRIDE = 48, 37  # of guidance images, in pixels, from step to step at another place: kernels are local
_LOG_TEMPERATURE = 2.0  # at which keys of unit size tell colours about as far apart as the training-free kernel does
_LEAST = 1e-6  # of a weight, in logarithms


def begin_as_bilateral(stack: JBUStack, images: Tensor) -> None:
    """Set a new stack's weights so that its kernels are about those of training-free JBU.

    From random weights, training must first learn to follow edges, and with few images it learns to blur. Keys whose
    products have the training-free range kernel as softmax are found by minimising the Kullback-Leibler divergence of
    both kernels on images; the part that is added to the kernels starts as zero.

    Args:
        stack: without final convolution.
        images: [n, 3, H, W] uint8, n ≥ 1.
    """
    for stage in stack.stages:
        last = stage.fixup_proj[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(stage.range_temp, _LOG_TEMPERATURE)
        nn.init.constant_(stage.sigma_spatial, NARROW[0].sigma_spatial / NARROW[0].radius)
    fitted = [parameter for name, parameter in stack.named_parameters() if "fixup" not in name]
    optimizer = torch.optim.Adam(fitted, lr=_LEARNING_RATE)
    with torch.enable_grad():
        for step, image in zip(range(_STEPS), itertools.cycle(images.unbind()), strict=False):
            optimizer.zero_grad()
            divergence = _divergence(stack, image[None], step)
            divergence.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    logger.info("jbu begins at the training-free kernels: divergence %.2g", divergence.item() / len(stack.stages))


def _divergence(stack: JBUStack, image: Tensor, step: int) -> Tensor:
    """Divergence of the learned kernels from the training-free ones, mean over a crop, sum over the stages: []."""
    total = torch.zeros((), device=image.device)
    for number, stage in enumerate(stack.stages):
        shrunk = len(stack.stages) - 1 - number
        height, width = (max(side >> shrunk, 2 * stage.radius) for side in image.shape[2:])
        small = F.adaptive_avg_pool2d(image.float(), (height, width))
        top, left = (step * _STRIDE % max(1, side - _CROP) for side in (height, width))
        crop = small[:, :, top : top + _CROP, left : left + _CROP]
        wanted = bilateral_kernel(crop / 255, NARROW[0].sigma_spatial, NARROW[0].sigma_range, NARROW[0].radius)
        kernel = learned_kernel(imagenet_normalised(crop), stage)
        logarithms = (one.clamp(min=_LEAST).log() for one in (wanted, kernel))
        total = total + (wanted * torch.sub(*logarithms)).sum(1).mean()
    return total
