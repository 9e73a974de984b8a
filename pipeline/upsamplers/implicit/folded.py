"""Fast evaluation of implicit networks on fixed pixels: sines and cosines are computed once for all steps.

With ``a = f·x`` fixed and phases b learned, ``sin(a + b) = sin a cos b + cos a sin b``: the 303 channels are a linear
map of fixed ones, and so are their mean and, from ``2 sin² a = 1 - cos 2a``, the mean of their squares. So phases,
normalisation and dropout are folded into the weights of the first convolution. It takes one matrix product forward and
one backward, and nothing else iterates over 303 channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.upsamplers.implicit.network import CHANNELS, WAVES, ImplicitNetworks, frequencies, positions_and_colours

__all__ = ["Dropout", "Waves", "render_folded"]

_EPSILON = 1e-5  # layer normalisation's


@dataclass(frozen=True)
class Dropout:
    """Dropout factors of one step, the same for all images: 0 if dropped, else the rescaling.

    Attributes:
        inputs: [303] floating.
        hidden: [k] floating.
    """

    inputs: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Waves:
    """The parts of the network's input channels that do not depend on its parameters.

    Attributes:
        once: [N, P, 303], sines and cosines of the angles, and colours.
        twice: [N, P, 300], sines and cosines of twice the angles.
        colour_squares: [N, P], sum of the squared colours.
    """

    once: Tensor
    twice: Tensor
    colour_squares: Tensor

    @classmethod
    def of(cls, networks: ImplicitNetworks, images: Tensor, dtype: torch.dtype = torch.float32) -> "Waves":
        """Compute the waves of images.

        Args:
            networks: the networks whose colour range applies.
            images: [N, 3, H, W], float32 or uint8; P = H·W.
            dtype: dtype of the result.
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
    """Compute `ImplicitNetworks.render`, differentiably with respect to the networks' parameters.

    Args:
        networks: N networks.
        waves: waves of their images.
        dropout: dropout of this step; None for none.

    Returns:
        [N, P, k]: the pixels' features, in the waves' dtype.
    """
    kept = networks.conv1_weight if dropout is None else networks.conv1_weight * dropout.inputs
    bias = networks.conv1_bias + (kept * networks.norm1_bias[:, None]).sum(2)
    centred = kept * networks.norm1_weight[:, None]
    centred = centred - centred.mean(2, keepdim=True)  # equals subtracting the mean of each pixel's channels
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
    """Convert weights [N, m, 303] for sin(a + b₀), cos(a + b₁), colours to weights for sin a, cos a, colours."""
    sines, cosines, colours = weight.tensor_split((WAVES, 2 * WAVES), 2)
    first, second = phases.flatten(2)[:, None].unbind(2)  # [N, 1, 150] each
    on_sines = sines * first.cos() - cosines * second.sin()
    on_cosines = sines * first.sin() + cosines * second.cos()
    return torch.cat([on_sines, on_cosines, colours], 2)


def _deviation_inverse(networks: ImplicitNetworks, waves: Waves) -> Tensor:
    """[N, P, 1]: reciprocal of the normalisation's standard deviation over channels."""
    phases = networks.phases
    each = phases.new_full((len(phases), 1, CHANNELS), 1 / CHANNELS)
    mean = torch.bmm(waves.once, _through_phases(each, phases).mT)
    first, second = (2 * phases.flatten(2)).unbind(1)  # [N, 150] each
    # sin²(a + b) = (1 - cos 2(a + b)) / 2 and cos²(a + b) = (1 + cos 2(a + b)) / 2.
    squares = torch.cat([first.sin() - second.sin(), second.cos() - first.cos()], 1) / 2
    sum_of_squares = torch.bmm(waves.twice, squares[:, :, None]) + WAVES + waves.colour_squares[:, :, None]
    return (sum_of_squares / CHANNELS - mean.square() + _EPSILON).rsqrt()
