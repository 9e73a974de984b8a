"""FeatUp's implicit networks, batched over images: position and colour of a pixel -> its features.

FeatUp (arXiv 2403.10516, section 3.2 and appendix). Parameters of N independent networks are stacked [N, ...], so that
their 1×1 convolutions are batched matrix products. `ImplicitNetworks.render` is the definition;
`pipeline.upsamplers.implicit.folded` computes the same faster for repeated evaluation on the same pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import JobError

__all__ = ["CHANNELS", "FittedNetwork", "ImplicitNetworks", "colour_range", "frequencies", "positions_and_colours"]

_FREQUENCIES, _INPUTS = 30, 5  # (row, column, red, green, blue)
WAVES = _FREQUENCIES * _INPUTS
CHANNELS = 2 * WAVES + 3
_SMALLEST_SPAN = 1e-4  # published: lower bound of a colour channel's span as a divisor
_TILE_PIXELS = 1 << 14  # pixels rendered at a time: 20 MB of channels

# Published name -> ours. The published network is a sequence; its layers 0, 3, 5, 6 and 9 have no parameters.
_PUBLISHED = {
    "1.biases": "phases",
    "2.norm.weight": "norm1_weight",
    "2.norm.bias": "norm1_bias",
    "4.weight": "conv1_weight",
    "4.bias": "conv1_bias",
    "7.norm.weight": "norm2_weight",
    "7.norm.bias": "norm2_bias",
    "8.weight": "conv2_weight",
    "8.bias": "conv2_bias",
    "10.weight": "conv3_weight",
    "10.bias": "conv3_bias",
}


@dataclass(frozen=True)
class FittedNetwork:
    """One image's stored network. Given the image at any resolution, it renders features at that resolution.

    Attributes:
        state: published name -> tensor of the published shape, float32.
        colour_low: [3] float32, minimum of each channel of the fitted image, in units of its pixels.
        colour_span: [3] float32, maximum minus minimum.
        scale: factor from the network's output to features.
    """

    state: dict[str, Tensor]
    colour_low: Tensor
    colour_span: Tensor
    scale: float

    def tensors(self) -> dict[str, Tensor]:
        """All attributes as named tensors, for storage."""
        extra = {"colour_low": self.colour_low, "colour_span": self.colour_span, "scale": torch.tensor(self.scale)}
        return {**self.state, **extra}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FittedNetwork":
        """Restore from `tensors`.

        Raises:
            JobError: a tensor is missing.
        """
        missing = [name for name in (*_PUBLISHED, "colour_low", "colour_span", "scale") if name not in tensors]
        if missing:
            raise JobError(
                f"Implicit network: got {len(tensors)} tensors, without {', '.join(missing)}. Fit and store it again."
            )
        state = {name: tensors[name] for name in _PUBLISHED}
        return cls(state, tensors["colour_low"], tensors["colour_span"], float(tensors["scale"]))


class ImplicitNetworks(nn.Module):
    """N networks of the same shape, one per image.

    A pixel's position and colour become 303 channels (sines and cosines at 30 frequencies with learned phases, and the
    colour itself), then: normalisation over channels, dropout, 1×1, ReLU, dropout, normalisation, 1×1, ReLU, 1×1.

    Args:
        images: N.
        num_chs: k, channels of the features, and of the hidden layers.
        seed: for the initial values, which are the same for every image, so that features do not depend on the batch.
    """

    colour_low: Tensor
    colour_span: Tensor

    def __init__(self, images: int, num_chs: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def stacked(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.repeat(images, *[1] * values.ndim))

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:  # PyTorch's initialisation of a convolution
            bound = 1 / math.sqrt(fan_in)
            return stacked((2 * torch.rand(*shape, generator=generator) - 1) * bound)

        self.num_chs = num_chs
        self.phases = stacked(torch.randn(2, _FREQUENCIES, _INPUTS, generator=generator))
        self.norm1_weight, self.norm1_bias = stacked(torch.ones(CHANNELS)), stacked(torch.zeros(CHANNELS))
        self.conv1_weight, self.conv1_bias = uniform(CHANNELS, num_chs, CHANNELS), uniform(CHANNELS, num_chs)
        self.norm2_weight, self.norm2_bias = stacked(torch.ones(num_chs)), stacked(torch.zeros(num_chs))
        self.conv2_weight, self.conv2_bias = uniform(num_chs, num_chs, num_chs), uniform(num_chs, num_chs)
        self.conv3_weight, self.conv3_bias = uniform(num_chs, num_chs, num_chs), uniform(num_chs, num_chs)
        self.register_buffer("colour_low", torch.zeros(images, 3))
        self.register_buffer("colour_span", torch.ones(images, 3))

    @classmethod
    def stack(cls, fitted: Sequence[FittedNetwork]) -> "ImplicitNetworks":
        """Stack fitted networks; the caller applies their scales.

        Raises:
            JobError: a tensor does not have the shape of an implicit network with the first one's k.
        """
        networks = cls(len(fitted), len(fitted[0].state["10.bias"]))
        state = {ours: torch.stack([network.state[name] for network in fitted]) for name, ours in _PUBLISHED.items()}
        state["colour_low"] = torch.stack([network.colour_low for network in fitted])
        state["colour_span"] = torch.stack([network.colour_span for network in fitted])
        for name, tensor in networks.state_dict().items():
            if state[name].numel() != tensor.numel():
                got, need = list(state[name].shape), list(tensor.shape)
                raise JobError(f"Implicit network: got {name} of shape {got}, expected {need}. Is it a FeatUp network?")
            # Published phases are stored as [2, 5, 30] but used in memory order as [2, 30, 5].
            tensor.copy_(state[name].reshape(tensor.shape))
        return networks

    def fitted(self, image: int, scale: float = 1.0) -> FittedNetwork:
        """One image's network for storage, on the CPU."""
        k = self.num_chs
        shapes = {"1.biases": (2, _INPUTS, _FREQUENCIES), "4.weight": (k, CHANNELS, 1, 1)}
        shapes |= {"8.weight": (k, k, 1, 1), "10.weight": (k, k, 1, 1)}
        state = {}
        for name, ours in _PUBLISHED.items():
            tensor = self.get_parameter(ours)[image].detach().cpu().clone()
            state[name] = tensor.reshape(shapes.get(name, tensor.shape))
        return FittedNetwork(state, self.colour_low[image].cpu(), self.colour_span[image].cpu(), scale)

    def look_at(self, images: Tensor) -> None:
        """Set the colour range from the images [N, 3, H, W] to be fitted."""
        low, span = colour_range(images)
        self.colour_low.copy_(low)
        self.colour_span.copy_(span)

    def render(self, images: Tensor) -> Tensor:
        """Compute features at the images' resolution.

        Args:
            images: [N, 3, H, W], float32 or uint8, in the units of the fitted images; any H and W.

        Returns:
            [N, k, H, W] float32.

        Raises:
            ValueError: the shape is not [N, 3, H, W] for this number of networks.
        """
        if images.ndim != 4 or images.shape[:2] != (len(self.conv1_bias), 3):
            raise ValueError(f"images: got {list(images.shape)}, expected [{len(self.conv1_bias)}, 3, H, W]")
        inputs = positions_and_colours(images, self.colour_low, self.colour_span)
        tiles = [self._pixels(tile) for tile in torch.split(inputs, max(1, _TILE_PIXELS // len(images)), 1)]
        return torch.cat(tiles, 1).mT.reshape(len(images), self.num_chs, *images.shape[2:])

    def _pixels(self, inputs: Tensor) -> Tensor:
        """[N, P, 5] -> [N, P, k]."""
        # Arguments reach 22,000. They are rounded to float32 before the sine, as published.
        angles = inputs[:, :, None] * frequencies(inputs.device)[:, None]  # [N, P, 30, 5]
        sines = (angles + self.phases[:, None, 0]).sin().flatten(2)
        cosines = (angles + self.phases[:, None, 1]).cos().flatten(2)
        x = F.layer_norm(torch.cat([sines, cosines, inputs[:, :, 2:]], 2), (CHANNELS,))
        x = x * self.norm1_weight[:, None] + self.norm1_bias[:, None]
        x = torch.baddbmm(self.conv1_bias[:, None], x, self.conv1_weight.mT).relu()
        x = F.layer_norm(x, (self.num_chs,)) * self.norm2_weight[:, None] + self.norm2_bias[:, None]
        x = torch.baddbmm(self.conv2_bias[:, None], x, self.conv2_weight.mT).relu()
        return torch.baddbmm(self.conv3_bias[:, None], x, self.conv3_weight.mT)


def colour_range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and span of each channel: [N, 3, H, W] -> two tensors [N, 3] float32."""
    flat = images.flatten(2).float()
    low = flat.amin(2)
    return low, flat.amax(2) - low


def frequencies(device: torch.device) -> Tensor:
    """[30] float32, in radians per unit of position or colour."""
    return torch.linspace(-2, 10, _FREQUENCIES, device=device).exp()


def positions_and_colours(images: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """The inputs of a network.

    Args:
        images: [N, 3, H, W], float32 or uint8.
        low: [N, 3] float32, the value mapped to -½.
        span: [N, 3] float32, non-negative; ``low + span`` is mapped to ½.

    Returns:
        [N, H·W, 5] float32: row and column of each pixel from -1 (the first) to 1 (the last), then its colour.
    """
    N, _, H, W = images.shape
    colours = (images.float() - low[:, :, None, None]) / span.clamp_min(_SMALLEST_SPAN)[:, :, None, None] - 0.5
    rows, columns = (torch.linspace(-1, 1, length, device=images.device) for length in (H, W))
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(N, 2, H, W)
    return torch.cat([places, colours], 1).flatten(2).mT
