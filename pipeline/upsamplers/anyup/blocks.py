"""Building blocks of AnyUp, with the published state-dict names (Wimmer et al., arXiv 2510.12764)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GROUPS", "CrossDecode", "Encoder", "FeatureEmbedding", "ResBlock", "Rope", "conv_matrix", "rotate"]

GROUPS = 8  # published: groups of every group normalisation
_EMBEDDED_BYTES = 4 << 20  # size of a chunk of the embedding: it should fit into a CPU's cache


class ResBlock(nn.Module):
    """Residual block: twice group normalisation, SiLU and a 1×1 convolution without bias, added to the input."""

    def __init__(self, chs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(GROUPS, chs), nn.SiLU(), nn.Conv2d(chs, chs, 1, bias=False)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, chs, H, W], floating -> same shape and dtype."""
        result: Tensor = x + self.block(x)
        return result

    def norm(self, half: int) -> nn.GroupNorm:
        """The normalisation of the first (0) or second (1) half."""
        norm = self.block[3 * half]
        assert isinstance(norm, nn.GroupNorm)
        return norm

    def matrix(self, half: int) -> Tensor:
        """The convolution of the first (0) or second (1) half as a matrix [chs, chs]."""
        return conv_matrix(self.block[3 * half + 2])


def conv_matrix(conv: nn.Module) -> Tensor:
    """A 1×1 convolution as a matrix [out_chs, in_chs]."""
    assert isinstance(conv, nn.Conv2d)
    return conv.weight[:, :, 0, 0]


class Encoder(nn.Sequential):
    """A first layer with ``chs`` output channels, followed by two residual blocks."""

    def __init__(self, first: nn.Module, chs: int) -> None:
        super().__init__(first, ResBlock(chs), ResBlock(chs))

    @property
    def blocks(self) -> list[ResBlock]:
        """The residual blocks in order."""
        return [layer for layer in self if isinstance(layer, ResBlock)]


class FeatureEmbedding(nn.Module):
    """Embed features of any number of channels: AnyUp's feature-agnostic layer (section 4.1 of the paper).

    Every channel is convolved with every filter of one basis (zero padding, divided by the number of taps inside the
    image). According to the paper, a softmax over the filters and a mean over the channels follow. The implementation
    behind the published weights stores the C·chs results channel by channel but reads them as if stored filter by
    filter: its softmax runs over every C-th result, and the output depends on the order of the channels. This class
    does the same, because the weights were trained that way; the reference case confirms it.

    Args:
        chs: number of filters and of output channels.
        size: side of the filters; odd.
    """

    def __init__(self, chs: int, size: int = 5) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(chs, 1, size, size))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w], floating, of unit length over C -> [B, chs, h, w]; processes a few positions at a time."""
        (B, C), (chs, _, size, _) = features.shape[:2], self.basis.shape
        padded = F.pad(features, [size // 2] * 4)
        inside = F.pad(torch.ones_like(features[:1, :1]), [size // 2] * 4)
        taps = inside.unfold(2, size, 1).unfold(3, size, 1).sum((-2, -1))  # [1, 1, h, w]
        filters = self.basis.flatten(1).T  # [size*size, chs]
        at_once = max(1, _EMBEDDED_BYTES // (B * C * chs * features.element_size()))
        rows = []
        for y in range(features.shape[2]):
            patches = padded[:, :, y : y + size].unfold(3, size, 1)  # [B, C, size, w, size]
            patches = patches.permute(0, 3, 1, 2, 4).flatten(3) / taps[:, 0, y, :, None, None]
            parts = []
            for part in torch.split(patches, at_once, 1):
                responses = (part @ filters).reshape(B, part.shape[1], chs, C)  # not transposed: see the class
                parts.append(torch.softmax(responses, 2).mean(3))
            rows.append(torch.cat(parts, 1))
        return torch.stack(rows, 1).permute(0, 3, 1, 2)


class Rope(nn.Module):
    """Rotary position embedding with learned frequencies, over all channels at once.

    Args:
        chs: channels; a multiple of 4.
    """

    def __init__(self, chs: int) -> None:
        super().__init__()
        quarter = 2 * math.pi * 100.0 ** torch.linspace(0, -1, chs // 4)
        freqs = torch.zeros(2, chs)
        freqs[0, : chs // 2] = freqs[1, chs // 2 :] = quarter.repeat(2)
        self.freqs = nn.Parameter(freqs)

    def angles(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Rows [n] and columns [m], 0 at the first pixel's centre and 1 at the last's -> [n, m, chs] radians."""
        return rows[:, None, None] * self.freqs[0] + columns[:, None] * self.freqs[1]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair of channels c and c + chs/2: [..., chs], floating -> same shape."""
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class CrossAttention(nn.Module):
    """Parameters of the attention: norms and projections of queries and keys.

    The checkpoints also hold value and output projections in ``attention``. They are unused: values are averaged
    unprojected.
    """

    def __init__(self, chs: int, heads: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(chs)
        self.norm_k = nn.RMSNorm(chs)
        self.attention = nn.MultiheadAttention(chs, heads, batch_first=True)


class CrossDecode(nn.Module):
    """Parameters of the cross-attention, which `pipeline.upsamplers.anyup.network` computes.

    Args:
        chs: channels of queries and keys.
        heads: attention heads; must divide ``chs``.
    """

    def __init__(self, chs: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(chs, heads)
        self.conv2d = nn.Conv2d(chs, chs, 3, padding=1, bias=False)
