"""Evaluate a branch of NAF's encoder over large images in bounded memory: strip by strip, in place.

Its convolutions are 1×1 or 3×3 with a reflected border. A strip of rows therefore also needs the row above it, kept
from before it was overwritten, and the row below it. Group normalisation needs the moments of the whole image, which
the pass before gathers. No gradients: the buffer is overwritten.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.upsamplers.moments import Moments
from pipeline.upsamplers.naf.blocks import Branch

__all__ = ["encode_image"]

# Pixels of a strip, over all images of the batch.
_STRIP_PIXELS = {"cpu": 8192, "cuda": 1 << 30}

_Affine = tuple[Tensor, Tensor]  # scale and shift per channel: [B, 1, chs] each


def encode_image(branch: Branch, image: Tensor) -> Tensor:
    """Run a branch: a convolution, then blocks of two normalised convolutions.

    Equals ``branch`` up to rounding: moments are summed in another order, and merged in float64.

    Args:
        branch: the branch; its parameters are cast to the image's dtype.
        image: [B, 3, H, W], floating, H and W at least 2.

    Returns:
        [B, H, W, chs], contiguous, dtype of image.
    """
    buffer = image.new_empty(len(image), *image.shape[2:], branch.first.out_channels)
    moments = _convolve(branch.first, image.permute(0, 2, 3, 1), buffer, None)
    for norm, conv in branch.normalised:
        moments = _convolve(conv, buffer, buffer, moments.affine(norm))
    return buffer


def _convolve(conv: nn.Conv2d, source: Tensor, target: Tensor, affine: _Affine | None) -> Moments:
    """Normalise and activate a source [B, H, W, c] if ``affine`` is given, convolve it, and return the moments.

    ``target`` [B, H, W, chs] may be the source.
    """
    moments = Moments()
    weight = conv.weight.to(source.dtype, memory_format=torch.channels_last)
    bias = None if conv.bias is None else conv.bias.to(source.dtype)
    for rows, strip in _strips(source, conv.kernel_size[0] // 2, affine):
        if conv.kernel_size == (1, 1):
            made = F.linear(strip, weight.flatten(1), bias)
        else:
            made = F.conv2d(strip.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
        target[:, rows] = made
        moments.add(made.flatten(1, 2))
    return moments


def _strips(source: Tensor, reach: int, affine: _Affine | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows, and the activated source of these rows with a border of ``reach`` (0 or 1) pixels around them.

    Rows that were yielded before may be overwritten.
    """
    B, H, W, c = source.shape
    height = max(1, _STRIP_PIXELS.get(source.device.type, _STRIP_PIXELS["cuda"]) // (B * W))
    above = source[:, 1]
    for top in range(0, H, height):
        bottom = min(top + height, H)
        rows = source[:, top:bottom]
        strip = source.new_empty(B, bottom - top + 2 * reach, W + 2 * reach, c)
        inner = strip[:, :, reach : W + reach]
        _activate(rows, affine, inner[:, reach : bottom - top + reach])
        if reach:
            last = source[:, bottom - 1].clone()
            _activate(above[:, None], affine, inner[:, :1])
            before_last = source[:, H - 2] if top <= H - 2 else above
            _activate((source[:, bottom] if bottom < H else before_last)[:, None], affine, inner[:, -1:])
            strip[:, :, 0], strip[:, :, -1] = strip[:, :, 2], strip[:, :, -3]
            above = last
        yield slice(top, bottom), strip


def _activate(x: Tensor, affine: _Affine | None, output: Tensor) -> None:
    """Write x [B, rows, W, c] to ``output``: normalised and through a SiLU, if ``affine`` is given."""
    if affine is None:
        output.copy_(x)
    else:
        scale, shift = (t[:, None] for t in affine)
        F.silu(torch.addcmul(shift, x, scale, out=output), inplace=True)
