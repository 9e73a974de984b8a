"""The implicit networks on pixels that stay: sines and cosines computed once, the first layer folded onto them.

With ``a = f·x`` fixed and phases b learned, ``sin(a + b) = sin a cos b + cos a sin b``: the 303 channels are a linear
map of fixed ones, and so are their mean and, from ``2 sin² a = 1 - cos 2a``, the mean of their squares. So phases,
normalisation and dropout go into the weights of the first convolution: it takes one product of matrices forward and
one backward, and nothing else passes over 303 channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.upsamplers.implicit.network import CHANNELS, WAVES, ImplicitNetworks, frequencies, positions_and_colours

__all__ = ["Dropout", "Waves", "render_folded"]

_EPSILON = 1e-5  # of layer normalisation


@dataclass(frozen=True)
class Dropout:
    """Which channels a step keeps, in all images: 0, or what makes up for those that are dropped.

    Attributes:
        inputs: [303] floating.
        hidden: [k] floating.
    """

    inputs: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Waves:
    """What of the network's channels does not depend on its parameters.

    Attributes:
        once: [N, P, 303], sines, cosines, colours.
        twice: [N, P, 300], sines and cosines of twice the angle.
        colour_squares: [N, P], sum of the colours' squares.
    """

    once: Tensor
    twice: Tensor
    colour_squares: Tensor

    @classmethod
    def of(cls, networks: ImplicitNetworks, images: Tensor, dtype: torch.dtype = torch.float32) -> "Waves":
        """Compute them.

        Args:
            networks: whose range of colours is taken.
            images: [N, 3, H, W], float32 or uint8; P = H·W.
            dtype: of the channels.
        """
        inputs = positions_and_colours(images, networks.colour_low, networks.colour_span)
        angles = (inputs[:, :, None] * frequencies(inputs.device)[:, None]).flatten(2)
        if dtype == torch.float64:
            angles = angles.double()
        sines, cosines = angles.sin(), angles.cos()
        once = torch.cat([sines, cosines, inputs[:, :, 2:].to(angles.dtype)], 2)
        twice = torch.cat([2 * sines * cosines, cosines.square() - sines.square()], 2)
        return cls(once.to(dtype), twice.to(dtype), once[:, :, 2 * WAVES :].square().sum(2))


def render_folded(networks: ImplicitNetworks, waves: Waves, dropout: Dropout | None = None) -> Tensor:
    """As `ImplicitNetworks.render`, differentiable in the networks' parameters.

    Args:
        networks: N of them.
        waves: of their images.
        dropout: which channels to keep; None: all.

    Returns:
        [N, P, k]: the pixels' features, in the dtype of the waves.
    """
    kept = networks.conv1_weight if dropout is None else networks.conv1_weight * dropout.inputs
    bias = networks.conv1_bias + (kept * networks.norm1_bias[:, None]).sum(2)
    centred = kept * networks.norm1_weight[:, None]
    centred = centred - centred.mean(2, keepdim=True)  # instead of the mean of each pixel's channels
    x = torch.bmm(waves.once, _through_phases(centred, networks.phases).mT)  # [N, P, k]
    x = torch.addcmul(bias[:, None].to(x.dtype), x, _deviation_inverse(networks, waves).to(x.dtype)).relu()
    if dropout is not None:
        x = x * dropout.hidden.to(x.dtype)
    x = F.layer_norm(x, (networks.num_chs,))
    # The normalisation's weight and bias, folded into the next convolution.
    second = networks.conv2_weight * networks.norm2_weight[:, None]
    second_bias = networks.conv2_bias + (networks.conv2_weight * networks.norm2_bias[:, None]).sum(2)
    x = torch.baddbmm(second_bias[:, None], x, second.mT).relu()
    return torch.baddbmm(networks.conv3_bias[:, None], x, networks.conv3_weight.mT)


def _through_phases(weight: Tensor, phases: Tensor) -> Tensor:
    """Weights [N, m, 303] of sin(a + b₀), cos(a + b₁), colours -> those of sin a, cos a, colours."""
    sines, cosines, colours = weight.tensor_split((WAVES, 2 * WAVES), 2)
    first, second = phases.flatten(2)[:, None].unbind(2)  # [N, 1, 150] each
    on_sines = sines * first.cos() - cosines * second.sin()
    on_cosines = sines * first.sin() + cosines * second.cos()
    return torch.cat([on_sines, on_cosines, colours], 2)


def _deviation_inverse(networks: ImplicitNetworks, waves: Waves) -> Tensor:
    """[N, P, 1]: what the normalisation over channels divides by, inverted."""
    phases = networks.phases
    each = phases.new_full((len(phases), 1, CHANNELS), 1 / CHANNELS)
    mean = torch.bmm(waves.once, _through_phases(each, phases).mT)
    first, second = (2 * phases.flatten(2)).unbind(1)  # [N, 150] each
    # sin²(a + b) = (1 - cos 2(a + b)) / 2 and cos²(a + b) = (1 + cos 2(a + b)) / 2.
    squares = torch.cat([first.sin() - second.sin(), second.cos() - first.cos()], 1) / 2
    sum_of_squares = torch.bmm(waves.twice, squares[:, :, None]) + WAVES + waves.colour_squares[:, :, None]
    return (sum_of_squares / CHANNELS - mean.square() + _EPSILON).rsqrt()
