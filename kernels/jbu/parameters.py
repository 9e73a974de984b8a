"""Learned parameters of joint bilateral upsampling: those of a stage, and of FeatUp's stack."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["JBUStack", "JBUStage", "StageParameters"]


class JBUStage(nn.Module):
    """The parameters of one learned stage, under their published state-dict names.

    FeatUp (arXiv 2403.10516, section 3.2): ``range_temp``, ``sigma_spatial``, ``range_proj.0/.3``, ``fixup_proj.0/.3``.
    It has no ``forward``: `kernels.jbu` defines what these parameters mean, and has several implementations.

    Args:
        guidance_dim: channels of the guidance image.
        key_dim: channels of the keys whose products form the range kernel.
        radius: radius of the kernel in output pixels, at least 1.

    Raises:
        ValueError: an argument is not an integer of at least 1.
    """

    def __init__(self, guidance_dim: int = 3, key_dim: int = 32, radius: int = 3) -> None:
        super().__init__()
        for name, value in (("guidance_dim", guidance_dim), ("key_dim", key_dim), ("radius", radius)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: got {value!r}, need an integer, at least 1")
        self.guidance_dim = guidance_dim
        self.radius = radius
        taps = (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        # Index 2 was a dropout. An identity keeps the published numbering, and cannot be left enabled by mistake.
        self.range_proj = nn.Sequential(
            nn.Conv2d(guidance_dim, key_dim, 1), nn.GELU(), nn.Identity(), nn.Conv2d(key_dim, key_dim, 1)
        )
        self.fixup_proj = nn.Sequential(
            nn.Conv2d(taps + guidance_dim, taps, 1), nn.GELU(), nn.Identity(), nn.Conv2d(taps, taps, 1)
        )


class JBUStack(nn.Module):
    """The parameters of FeatUp's published stack, under their state-dict names: four stages and a 1×1 convolution.

    Args:
        num_chs: channels of the features that the final convolution mixes; None: a stack without it, which depends only
            on the guidance and so serves all kinds of features.
    """

    def __init__(self, num_chs: int | None) -> None:
        super().__init__()
        self.up1, self.up2, self.up3, self.up4 = (JBUStage() for _ in range(4))
        if num_chs is not None:
            self.fixup_proj = nn.Sequential(nn.Identity(), nn.Conv2d(num_chs, num_chs, 1))  # published index: 1

    @property
    def stages(self) -> tuple[JBUStage, ...]:
        """The stages in order."""
        return self.up1, self.up2, self.up3, self.up4

    @property
    def final(self) -> nn.Conv2d | None:
        """The final convolution, if there is one."""
        if not hasattr(self, "fixup_proj"):
            return None
        final = self.fixup_proj[1]
        assert isinstance(final, nn.Conv2d)
        return final


class StageParameters(NamedTuple):
    """A stage's tensors by function. T = (2*radius + 1)² taps, D key channels, G guidance channels.

    Attributes:
        range_temp: [], natural logarithm of the factor on key products.
        sigma_spatial: [], standard deviation of the spatial Gaussian, in kernel radii.
        key_weight0: [D, G].
        key_bias0: [D].
        key_weight1: [D, D].
        key_bias1: [D].
        fixup_weight0: [T, T + G]; the first T columns are for the kernel, the last G for the guidance.
        fixup_bias0: [T].
        fixup_weight1: [T, T].
        fixup_bias1: [T].
    """

    range_temp: Tensor
    sigma_spatial: Tensor
    key_weight0: Tensor
    key_bias0: Tensor
    key_weight1: Tensor
    key_bias1: Tensor
    fixup_weight0: Tensor
    fixup_bias0: Tensor
    fixup_weight1: Tensor
    fixup_bias1: Tensor

    @classmethod
    def of(cls, stage: JBUStage) -> "StageParameters":
        """The tensors of a module; gradients propagate to its parameters."""
        tensors = list(stage.range_proj.parameters()) + list(stage.fixup_proj.parameters())
        return cls(stage.range_temp, stage.sigma_spatial, *(t.flatten(1) if t.ndim == 4 else t for t in tensors))

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor]) -> "StageParameters":
        """Build from the tensors in order, as an operator receives them."""
        return cls(*tensors)

    @property
    def radius(self) -> int:
        """Radius of the kernel in output pixels."""
        return math.isqrt(self.fixup_bias1.numel()) // 2

    def keys(self, guidance: Tensor) -> Tensor:
        """Keys of a guidance image: [B, G, H, W] -> [B, D, H, W]."""
        return _perceptron(guidance, self.key_weight0, self.key_bias0, self.key_weight1, self.key_bias1)

    def fixup(self, kernel_and_guidance: Tensor) -> Tensor:
        """Correction of a kernel: [B, T + G, H, W] -> [B, T, H, W]."""
        return _perceptron(
            kernel_and_guidance, self.fixup_weight0, self.fixup_bias0, self.fixup_weight1, self.fixup_bias1
        )


def _perceptron(x: Tensor, weight0: Tensor, bias0: Tensor, weight1: Tensor, bias1: Tensor) -> Tensor:
    hidden = F.gelu(F.conv2d(x, weight0[:, :, None, None], bias0))
    return F.conv2d(hidden, weight1[:, :, None, None], bias1)
