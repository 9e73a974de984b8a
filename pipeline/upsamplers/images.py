"""What upsamplers do with images and maps alike: check them, normalise them, resize, and find those without content."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ImageError

__all__ = ["check_images", "imagenet_normalised", "one_colour", "one_colour_failures", "resize"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_images(features: Tensor, images: Tensor, size: tuple[int, int]) -> None:
    """Features [B, channels, h, w], their images and the output's size, as every upsampler takes them."""
    if features.ndim != 4 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"features: got {tuple(features.shape)} {features.dtype}, need [B, channels, h, w] of a floating dtype, "
            "not empty"
        )
    if images.ndim != 4 or images.shape[:2] != (features.shape[0], 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"images: got {tuple(images.shape)} {images.dtype}, need [{features.shape[0]}, 3, H, W] of uint8 RGB"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: got {size}, need height and width of at least 1")


def imagenet_normalised(images: Tensor) -> Tensor:
    """uint8 RGB [B, 3, H, W] -> float32, with ImageNet's mean and deviation: what all published weights take."""
    mean, std = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear. Linear in the features and keeps constants, so `LinearUpsampler.fold` holds through it."""
    if features.shape[2:] == size:
        return features
    # Down to half the size, plain bilinear interpolation looks at every pixel; antialiasing costs as much as a stage
    # (50 of 108 ms an image on one core, 256 -> 224, k = 64) and is left to where pixels would be passed over.
    skips = features.shape[2] > 2 * size[0] or features.shape[3] > 2 * size[1]
    return F.interpolate(features, size, mode="bilinear", align_corners=False, antialias=skips)


def one_colour(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B] bool: whether all pixels of an image are alike."""
    pixels = images.flatten(2)
    return (pixels.amax(2) == pixels.amin(2)).all(1)


def one_colour_failures(images: Tensor) -> dict[int, ImageError]:
    """Images [B, 3, H, W] of one colour, by number, for what fits features to each image.

    Their features still vary by position, so that a fit would not notice.
    """
    message = "all of it has one colour: there is nothing to fit"
    return {image: ImageError("constant", message) for image in one_colour(images).nonzero().flatten().tolist()}
