"""Image helpers of the upsamplers: normalise, resize, and detect single-colour images, which cannot be fitted."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ImageError

__all__ = ["imagenet_normalised", "one_colour", "one_colour_error", "resize"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def one_colour(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B] bool: whether all pixels of each image are equal."""
    pixels = images.flatten(2)
    return (pixels.amax(2) == pixels.amin(2)).all(1)


def one_colour_error() -> ImageError:
    """Error for a single-colour image. Its features may still vary with position, so a fit would not notice."""
    return ImageError("constant", "the whole image has one colour: there is nothing to fit")


def imagenet_normalised(images: Tensor) -> Tensor:
    """uint8 RGB [B, 3, H, W] -> float32, normalised by ImageNet's mean and std, as all published weights expect."""
    mean, std = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly. Linear in the features and preserves constants, so `LinearUpsampler.fold` stays valid."""
    if features.shape[2:] == size:
        return features
    # Down to half the size, plain bilinear interpolation reads every pixel. Antialiasing costs as much as a stage
    # (50 of 108 ms per image on one core, 256 -> 224, k = 64), so it is used only where pixels would be skipped.
    skips = features.shape[2] > 2 * size[0] or features.shape[3] > 2 * size[1]
    return F.interpolate(features, size, mode="bilinear", align_corners=False, antialias=skips)
