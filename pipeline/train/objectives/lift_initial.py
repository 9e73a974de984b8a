"""Initial weights for LiFT: bilinear interpolation, as closely as its narrow layers allow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.upsamplers.lift.network import LiFT

__all__ = ["PLACES_PER_CHANNEL", "begin_as_interpolation"]

# In a sample. With one, the interpolation error on other images is twice as large; fewer are too few.
PLACES_PER_CHANNEL = 4

# Channels enter a ReLU with mean 3 and standard deviation 1, so hardly any values are clipped.
_LIFTED = 3.0
_LEAST_VARIANCE = 1e-3  # lower bound of a component's variance, as a share of the mean: limits amplification
_RIDGE = 1e-6  # of the last convolution's fit, as a share of its inputs' mean square


@torch.no_grad()
def begin_as_interpolation(lift: LiFT, features: Tensor, image: Tensor) -> None:
    """Set a new network's weights so that it interpolates bilinearly, as far as its layers are wide enough.

    From random weights, most steps are spent on learning to pass the input through; with few images that never
    succeeds. The transposed convolution becomes a projection on C/2 principal components of the features, each repeated
    2×2; the first convolution becomes [1 2 1]/4 along both axes, which turns the repetition into bilinear
    interpolation; the second becomes the identity; the last is fitted by least squares to its inputs. The image branch
    is unchanged and has no influence yet.

    Args:
        lift: new network, in training mode, on the CPU or a GPU.
        features: [B, C, h, w] float32, a sample of its inputs with at least `PLACES_PER_CHANNEL` · C positions.
        image: [B, 3, H, W] float32, ImageNet-normalised, covering the same area as ``features``.

    Raises:
        JobError: the features have fewer than C positions.
    """
    B, C, h, w = features.shape
    if B * h * w < C:
        raise JobError(
            f"lift starts as interpolation of {C} channels, which needs at least {C} positions in training images: got "
            f"{B} images of {h}×{w}. Give more images, a larger --size, an earlier layer, or --lift-initial random"
        )
    width = lift.outc.in_channels
    components, mean = _components(features, width)
    _set(lift.up1.up, components, -(components @ mean))
    convs = lift.up1.conv_1.double_conv
    first, second = (module for module in convs if isinstance(module, nn.Conv2d))
    triangle = torch.tensor([0.25, 0.5, 0.25])
    identity = torch.eye(width)[:, :, None, None]
    first.weight.zero_()
    first.weight[:, :width] = identity.to(first.weight) * torch.outer(triangle, triangle).to(first.weight)
    second.weight.copy_(F.pad(identity, (1, 1, 1, 1)))
    for norm in _norms(convs):
        norm.bias.fill_(_LIFTED)
    _set_running_statistics(lift, features, image)
    was_training = lift.training
    inner = lift.eval().inner(features, image)
    lift.train(was_training)
    wanted = F.interpolate(features, scale_factor=2.0, mode="bilinear")
    weight, bias = _least_squares(_places(inner), _places(wanted))
    lift.outc.weight.copy_(weight.mT[:, :, None, None])
    assert lift.outc.bias is not None
    lift.outc.bias.copy_(bias)


def _components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal components, scaled to variance 1: [count, C]; and the mean [C]; float32."""
    places = _places(features)
    mean = places.mean(0)
    variances, vectors = torch.linalg.eigh((places - mean).T.cov(correction=0))
    kept = variances.flip(0)[:count]
    kept = kept.clamp_min(_LEAST_VARIANCE * kept.mean())
    return (vectors.flip(1)[:, :count] / kept.sqrt()).mT.float(), mean.float()


def _set(up: nn.ConvTranspose2d, components: Tensor, bias: Tensor) -> None:
    """Make its first outputs the components of its first inputs; other outputs are unchanged."""
    count, num_chs = components.shape
    up.weight[:, :count] = 0
    up.weight[:num_chs, :count] = components.mT[:, :, None, None]
    assert up.bias is not None
    up.bias[:count] = bias


def _set_running_statistics(lift: LiFT, features: Tensor, image: Tensor) -> None:
    norms = _norms(lift)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    lift.inner(features, image)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def _least_squares(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Fit weights [n, C] and bias [C], float32, that map inputs [N, n] to outputs [N, C], both float64."""
    centred, wanted = inputs - inputs.mean(0), outputs - outputs.mean(0)
    squares = centred.mT @ centred
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
    weight = torch.linalg.solve(squares, centred.mT @ wanted)
    return weight.float(), (outputs.mean(0) - inputs.mean(0) @ weight).float()


def _places(features: Tensor) -> Tensor:
    """[B, C, h, w] -> [B·h·w, C] float64."""
    return features.movedim(1, 3).flatten(0, 2).double()
