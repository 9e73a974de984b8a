"""Training-free joint bilateral upsampling in plain torch: the definition that `kernels.jbu` is tested against.

Kopf et al., Joint Bilateral Upsampling (SIGGRAPH 2007), in ×2 stages as in FeatUp (arXiv 2403.10516). It lies in this
package because readers of compact stores take the same steps (`densefeat.torch.last_step`). Everything is
differentiable and runs in any floating dtype on any device.

Kernels are [B, n*n, H, W] with n = 2*radius + 1, taps row-major: tap ``a*n + b`` is the weight of pixel ``(y + a -
radius, x + b - radius)``, reflected at the border without repeating the edge.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "StageSettings",
    "adaptive_conv_upsample2x",
    "bilateral_kernel",
    "bilateral_stage",
    "pooled_to_twice",
    "resize",
    "settings_of",
    "shifted",
    "stages_to",
    "upsample",
]

_ROWS_IN_CACHE = 8  # of 64 channels and 256 pixels: 0.5 MB of float32


class StageSettings(NamedTuple):
    """Settings of one ×2 stage, as arguments of `bilateral_stage`.

    Attributes:
        radius: of the kernel, in pixels of the stage's output.
        sigma_spatial: spatial standard deviation, in the same pixels.
        sigma_range: standard deviation of the colours' distances, in RGB of 0 … 1.
    """

    radius: int
    sigma_spatial: float
    sigma_range: float


def upsample(source: Tensor, images: Tensor, size: tuple[int, int], settings: Sequence[StageSettings]) -> Tensor:
    """Upsample in as many ×2 stages as needed, then bilinearly to exactly ``size``.

    Args:
        source: [B, C, h, w], floating.
        images: [B, 3, H, W] uint8 RGB, of any size, covering the same area as ``source``.
        size: height and width of the output.
        settings: of the stages, see `settings_of`.

    Returns:
        [B, C, *size], dtype of ``source``.
    """
    pixels = images.float() / 255
    for number in range(stages_to((source.shape[2], source.shape[3]), size)):
        radius, sigma_spatial, sigma_range = settings_of(number, settings, (source.shape[2], source.shape[3]))
        guidance = pooled_to_twice(pixels, source)
        source = bilateral_stage(source, guidance, sigma_spatial, sigma_range, radius)
    return resize(source, size)


def settings_of(number: int, settings: Sequence[StageSettings], grid: tuple[int, int]) -> StageSettings:
    """Settings of stage ``number``, from 0, whose source has this height and width.

    The last of ``settings`` also holds for all later stages. The radius is at most what the border of a small image
    allows, which is reflected.
    """
    chosen = settings[min(number, len(settings) - 1)]
    return chosen._replace(radius=min(chosen.radius, 2 * min(grid) - 1))


def stages_to(grid: tuple[int, int], size: tuple[int, int]) -> int:
    """The smallest n with grid · 2^n >= size on both axes."""
    stages = 0
    while grid[0] << stages < size[0] or grid[1] << stages < size[1]:
        stages += 1
    return stages


def pooled_to_twice(pixels: Tensor, source: Tensor) -> Tensor:
    """The image at twice the source's size, in float32: colour distances lose more in half precision than kernels."""
    return F.adaptive_avg_pool2d(pixels, (2 * source.shape[2], 2 * source.shape[3]))


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, align_corners=False. Linear in the features, and preserves constants."""
    if features.shape[2:] == size:
        return features
    # Down to half the size, plain bilinear interpolation reads every pixel. Antialiasing costs as much as a stage
    # (50 of 108 ms per image on one core, 256 -> 224, k = 64), so it is used only where pixels would be skipped.
    skips = features.shape[2] > 2 * size[0] or features.shape[3] > 2 * size[1]
    return F.interpolate(features, size, mode="bilinear", align_corners=False, antialias=skips)


def bilateral_stage(source: Tensor, guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int) -> Tensor:
    """`bilateral_kernel` of the guidance [B, G, 2h, 2w], applied to the source [B, C, h, w].

    Returns:
        [B, C, 2h, 2w], dtype of source, channels_last.
    """
    kernel = bilateral_kernel(guidance, sigma_spatial, sigma_range, radius)
    return adaptive_conv_upsample2x(source, kernel.to(source.dtype))


def bilateral_kernel(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3) -> Tensor:
    """The training-free kernel: spatial Gaussian × colour Gaussian, normalised over the taps.

    Kopf et al., Joint Bilateral Upsampling (SIGGRAPH 2007), equation 3, with both Gaussians on the output's grid.

    Args:
        guidance: [B, G, H, W], floating and finite, H and W > radius.
        sigma_spatial: spatial standard deviation, in pixels of the guidance; > 0.
        sigma_range: standard deviation of the range kernel, in units of the guidance (Euclidean distance over its
            channels); > 0.
        radius: radius of the kernel, in pixels of the guidance.

    Returns:
        [B, n*n, H, W], dtype of guidance; non-negative, sums to 1 over taps.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=guidance.dtype, device=guidance.device)
    squares = (offsets / sigma_spatial).square()  # divided first: σ² may not be representable in this dtype
    spatial = (squares[:, None] + squares[None, :]).flatten()[:, None, None]
    taps = shifted(guidance, radius)
    colour = torch.stack([((guidance - tap) / sigma_range).square().sum(1) for tap in taps], dim=1)
    return torch.softmax(-(spatial + colour) / 2, dim=1)


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor) -> Tensor:
    """Upsample ×2 bicubically, then weight each output pixel's n × n neighbourhood with its own kernel.

    Bicubic with align_corners=False and a = −0.75 (Keys 1981, as in PyTorch); reflect padding;
    FeatUp's adaptive convolution (arXiv 2403.10516, equation 4).

    Args:
        source: [B, C, h, w], floating.
        kernel: [B, n*n, 2h, 2w], dtype of source; 2h and 2w > radius.

    Returns:
        [B, C, 2h, 2w], dtype of source, in channels_last memory format.
    """
    radius = math.isqrt(kernel.shape[1]) // 2
    high = F.interpolate(source, scale_factor=2, mode="bicubic", align_corners=False)
    padded = F.pad(high, [radius] * 4, mode="reflect")
    blocks = [
        _weighted(padded[:, :, start : stop + 2 * radius], kernel[:, :, start:stop], radius)
        for start, stop in _row_blocks(high)
    ]
    output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return output.contiguous(memory_format=torch.channels_last)


def _weighted(padded: Tensor, kernel: Tensor, radius: int) -> Tensor:
    """The sum over taps of kernel [B, n*n, H, W] times padded [B, C, H + 2*radius, W + 2*radius], shifted."""
    output = padded.new_zeros(*padded.shape[:2], *kernel.shape[2:])
    for weight, tap in zip(kernel.unbind(1), _taps(padded, radius), strict=True):
        output.addcmul_(weight[:, None], tap)
    return output


def _row_blocks(image: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows to compute at a time: all on a GPU; on a CPU a few, which stay in its cache over all taps."""
    rows = image.shape[2]
    size = rows if image.is_cuda else _ROWS_IN_CACHE
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def shifted(image: Tensor, radius: int) -> Iterator[Tensor]:
    """The image shifted for each tap of an n × n window, row-major: n*n views [B, C, H, W]."""
    yield from _taps(F.pad(image, [radius] * 4, mode="reflect"), radius)


def _taps(padded: Tensor, radius: int) -> Iterator[Tensor]:
    H, W = (length - 2 * radius for length in padded.shape[-2:])
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            yield padded[..., dy : dy + H, dx : dx + W]
