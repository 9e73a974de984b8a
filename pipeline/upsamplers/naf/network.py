"""NAF: upsample the features of any backbone with one set of weights, by attention that depends on the image alone.

Chambon et al., NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering (arXiv 2511.18452; code and
weights Apache-2.0). DiveUp (arXiv 2603.13571, MIT) trains the same network. The image is encoded to a query for every
output pixel. Their means over the cells of the feature map are the keys, and the features are the values. So the
output is linear in the features, and images that are encoded once serve any number of backbones.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from kernels.window.neighborhood import neighborhood_attention
from pipeline.errors import JobError
from pipeline.features.checkpoints import load_strict
from pipeline.upsamplers.naf.blocks import GROUPS, Branch, Rope, rotate
from pipeline.upsamplers.naf.stream import encode_image

__all__ = ["NAF"]

_MOST_REDUCED = 4  # published: the image has at most this many times the output's height and width
# On a GPU: size of all channels, in half precision, of the images that are encoded at once.
_IMAGES_BYTES = 512 << 20
_ROTATED_PIXELS = {"cpu": 4096, "cuda": 1 << 22}


class ImageEncoder(nn.Module):
    """Parameters of the encoder: a branch of 1×1 and a branch of 3×3 convolutions, and positions."""

    def __init__(self, chs: int, d: int) -> None:
        super().__init__()
        self.encoder, self.sem_encoder = (Branch(chs // 2, kernel_size) for kernel_size in (1, 3))
        self.rope = Rope(d)


class NAF(nn.Module):
    """The published network.

    Without gradients, images are encoded strip by strip. Memory is then, besides strips, chs numbers for each pixel of
    the output, and half as many for each of the image: 309 MB in float32 at 448 px. A CPU encodes one image at a time.
    With gradients, autograd keeps every activation.

    Args:
        chs: channels of queries and keys; half of them, and those of a head, are a multiple of 8. Published: 256.
        heads: attention heads. Published: 4.
        window: cells along an axis of the window; odd. Published: 9; not recorded in checkpoints.

    Raises:
        ValueError: ``chs`` or ``heads`` is not as above.
    """

    def __init__(self, chs: int = 256, heads: int = 4, window: int = 9) -> None:
        super().__init__()
        if min(chs, heads) < 1 or chs % (2 * GROUPS) or chs % (4 * heads):
            raise ValueError(
                f"chs: got {chs}, need a multiple of {2 * GROUPS}, for two branches of {GROUPS} groups, and of "
                f"{4 * heads}, for {heads} heads of a multiple of 4 channels"
            )
        self.chs, self.heads, self.window = chs, heads, window
        self.image_encoder = ImageEncoder(chs, chs // heads)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "NAF":
        """Build the network from a checkpoint's tensors, in evaluation mode, float32, on the CPU.

        Args:
            state: name -> tensor, every tensor of the network: NAF's ``naf_release.pth``, or DiveUp's
                ``model_25000steps.pth``, which have the same names.

        Raises:
            JobError: tensors are missing, unexpected or of the wrong shape.
        """
        first, periods = (state.get(f"image_encoder.{name}") for name in ("encoder.0.weight", "rope.periods"))
        fits = first is not None and first.ndim == 4 and periods is not None and periods.ndim == 1
        chs, quarter = (2 * len(first), len(periods)) if fits and first is not None and periods is not None else (0, 0)
        if not quarter or chs % (2 * GROUPS) or chs % (4 * quarter):
            got = [f"{'nothing' if x is None else f'shape {tuple(x.shape)}'}" for x in (first, periods)]
            raise JobError(
                f"NAF weights: got {got[0]} for image_encoder.encoder.0.weight and {got[1]} for "
                f"image_encoder.rope.periods among {len(state)} tensors, expected [128, 3, 1, 1] and [16]. Check that "
                "the weights are NAF's or DiveUp's."
            )
        naf = cls(chs, chs // (4 * quarter))
        load_strict(naf, state, what="weights into NAF")
        return naf.eval()

    @override
    def forward(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode the image and upsample features [B, C, h, w] with it: `encode`, then `upsample`."""
        return self.upsample(self.encode(image, size), features)

    def encode(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode images to queries, for the features of any backbone.

        Args:
            image: [B, 3, H, W], floating, ImageNet-normalised, H and W at least 2. It is encoded in its own dtype, with
                the moments of group normalisations in float32 or more. If it has more than four times the height or
                width of ``size``, it is resized first, as published.
            size: height and width of the upsampled features.

        Returns:
            [B, *size, heads, d], dtype of image.

        Raises:
            ValueError: an argument is not as above.
        """
        self._check(image, size)
        image = _reduced(image, size)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (image, *self.parameters())):
            return self._recorded(image, size)
        queries = image.new_empty(len(image), *size, self.heads, self.chs // self.heads)
        for part, images in zip(*(torch.split(t, self.images_at_once(image)) for t in (queries, image)), strict=True):
            for number, branch in enumerate((self.image_encoder.encoder, self.image_encoder.sem_encoder)):
                half = slice(number * self.chs // 2, (number + 1) * self.chs // 2)
                part.flatten(3)[..., half] = _pooled(encode_image(branch, images), size)
            self._rotate_in_place(part)
        return queries

    def upsample(self, queries: Tensor, values: Tensor, sum_heads: bool = False) -> Tensor:
        """Average values with the attention of encoded images.

        Args:
            queries: from `encode`, [B, H, W, heads, d].
            values: [B, C, h, w], floating, C a multiple of ``heads``; h divides H, w divides W.
            sum_heads: add the heads' outputs (`kernels.window.neighborhood.neighborhood_attention`).

        Returns:
            [B, C or C/heads, H, W], dtype of values.

        Raises:
            ValueError: an argument is not as above.
        """
        keys = self.keys(queries, (values.shape[2], values.shape[3]))
        return neighborhood_attention(queries, keys, values, self.window, sum_heads=sum_heads)

    def keys(self, queries: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average queries [B, H, W, heads, d] over the cells of a grid (h, w): [B, h, w, heads, d]."""
        return self._split_heads(_pooled(queries.flatten(3), grid))

    def images_at_once(self, image: Tensor) -> int:
        """Number of images like these to encode at once: one on a CPU, so that results do not depend on the batch."""
        encoded = self.chs * image.shape[2] * image.shape[3] * torch.float16.itemsize
        return 1 if image.device.type == "cpu" else max(1, _IMAGES_BYTES // encoded)

    def _recorded(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Compute queries with autograd."""
        encoder = self.image_encoder
        x = torch.cat([encoder.encoder(image), encoder.sem_encoder(image)], 1).permute(0, 2, 3, 1)
        x = self._split_heads(_pooled(x, size))
        return rotate(x, encoder.rope.angles(size, slice(None), _working(image))).to(image.dtype)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:3], self.heads, self.chs // self.heads)

    def _rotate_in_place(self, queries: Tensor) -> None:
        H, W = queries.shape[1:3]
        rows = max(1, _ROTATED_PIXELS.get(queries.device.type, _ROTATED_PIXELS["cuda"]) // W)
        for top in range(0, H, rows):
            strip = slice(top, top + rows)
            angles = self.image_encoder.rope.angles((H, W), strip, _working(queries))
            queries[:, strip] = rotate(queries[:, strip], angles)

    def _check(self, image: Tensor, size: tuple[int, int]) -> None:
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point() or min(image.shape[2:]) < 2:
            raise ValueError(
                f"image: got {tuple(image.shape)} {image.dtype}, need [B, 3, H, W] of a floating dtype, normalised, H "
                "and W at least 2: the border is reflected"
            )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: got {size}, need height and width of at least 1")


def _reduced(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image of more than four times the output's height or width; both limits hold for both axes."""
    most = _MOST_REDUCED * min(size)
    if image.shape[2] <= _MOST_REDUCED * size[0] and image.shape[3] <= _MOST_REDUCED * size[1]:
        return image
    reduced = (min(image.shape[2], most), min(image.shape[3], most))
    return F.interpolate(image, reduced, mode="bilinear", align_corners=False)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average [B, H, W, c] to [B, *size, c]."""
    if x.shape[1:3] == size:
        return x
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def _working(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
