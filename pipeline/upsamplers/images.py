"""Image helpers of the upsamplers: normalise, and detect single-colour images, which cannot be fitted."""

import torch
from torch import Tensor

from pipeline.errors import ImageError

__all__ = ["imagenet_normalised", "one_colour", "one_colour_error"]

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
