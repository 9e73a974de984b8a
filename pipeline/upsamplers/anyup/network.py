"""AnyUp: upsample the features of any backbone to any size with one set of weights, by attention to the image.

Wimmer et al., AnyUp: Universal Feature Upsampling (ICLR 2026, arXiv 2510.12764); published checkpoints are CC-BY-4.0.
Every output pixel is a weighted mean of the low-res features in a window around it; the weights come from the image
and from all C channels of the features. So the output is linear in the averaged values: PCA can be applied first,
exactly, as long as keys are computed from unprojected features. Hence the two arguments ``features`` and ``values``.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window.attention import windowed_attention
from pipeline.errors import JobError
from pipeline.features.checkpoints import load_strict
from pipeline.upsamplers.anyup.blocks import GROUPS, CrossDecode, Encoder, FeatureEmbedding, Rope, rotate
from pipeline.upsamplers.anyup.stream import encode, tiles

__all__ = ["AnyUp"]

_EPS = torch.finfo(torch.float32).eps  # published: epsilon of the norms of queries and keys
_IMAGES_BYTES = 2 << 30  # on a GPU: memory for images encoded at once


class AnyUp(nn.Module):
    """The published network.

    Without gradients, images are encoded in place, tile by tile. Memory is then two buffers of chs × the image's pixels
    (206 MB in float32 at 448 px), one of chs × the output's pixels, the output, and tiles
    (`pipeline.upsamplers.anyup.stream`, `kernels.window.attention`); a CPU processes one image at a time. With
    gradients, autograd keeps every activation.

    Args:
        chs: channels of queries and keys; a multiple of 8 and of ``heads``. Published: 128.
        heads: attention heads, at least 1. Published: 4; not recorded in checkpoints.
        window_ratio: reach of a window to each side, as a share of the axis. Published: 0.1.

    Raises:
        ValueError: ``chs`` or ``heads`` is not as above.
    """

    def __init__(self, chs: int = 128, heads: int = 4, window_ratio: float = 0.1) -> None:
        super().__init__()
        if min(chs, heads) < 1 or chs % GROUPS or chs % heads:
            raise ValueError(f"chs: got {chs}, need a multiple of {GROUPS} groups and of {heads} heads")
        self.chs, self.heads, self.window_ratio = chs, heads, window_ratio
        self.image_encoder = Encoder(nn.Conv2d(3, chs, 1, bias=False), chs)
        self.key_encoder = Encoder(nn.Conv2d(chs, chs, 1, bias=False), chs)
        self.query_encoder = Encoder(nn.Conv2d(chs, chs, 1, bias=False), chs)
        self.key_features_encoder = Encoder(FeatureEmbedding(chs), chs)
        self.cross_decode = CrossDecode(chs, heads)
        joining = nn.Conv2d(2 * chs, chs, 3, padding=1, padding_mode="reflect", bias=False)
        self.aggregation = Encoder(joining, chs)
        self.rope = Rope(chs)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "AnyUp":
        """Build the network from a checkpoint's tensors, in evaluation mode, float32, on the CPU.

        Args:
            state: name -> tensor, every tensor of the network; all names may have the prefix ``module.``.

        Raises:
            JobError: tensors are missing, unexpected or of the wrong shape.
        """
        if all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        first = state.get("image_encoder.0.weight")
        if first is None or first.ndim != 4 or first.shape[0] % GROUPS:
            got = "nothing" if first is None else f"shape {tuple(first.shape)}"
            raise JobError(
                f"AnyUp weights: got {got} for image_encoder.0.weight among {len(state)} tensors, expected "
                f"[chs, 3, 1, 1] with chs a multiple of {GROUPS}. Check that the weights are AnyUp's."
            )
        anyup = cls(first.shape[0])
        load_strict(anyup, state, what="weights into AnyUp")
        return anyup.eval()

    def forward(self, features: Tensor, values: Tensor, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Upsample.

        Args:
            features: [B, C, h, w], in the parameters' dtype, h and w at least 2, any C: the backbone's features,
                unprojected and not centred. Keys are computed from them.
            values: [B, k, h, w], floating: the values to average; ``features`` again, or any projection of them.
            image: [B, 3, H, W], dtype of ``features``, ImageNet-normalised, covering the same area as ``features``.
                Time and memory grow with its number of pixels.
            size: height and width of the output, larger or smaller than the image; None means the image's.

        Returns:
            [B, k, *size], dtype of ``values``.

        Raises:
            ValueError: an argument is not as above.
        """
        size = (image.shape[-2], image.shape[-1]) if size is None else size
        self._check(features, values, image, size)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (features, values, image, *self.parameters())):
            return windowed_attention(*self._recorded(features, image, size), values, self.window_ratio)
        output = values.new_empty(*values.shape[:2], *size)
        step = self._images_at_once(image)
        for start in range(0, len(image), step):
            part = slice(start, start + step)
            queries, keys = self._streamed(features[part], image[part], size)
            output[part] = windowed_attention(queries, keys, values[part], self.window_ratio)
        return output

    def _recorded(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute queries [B, *size, heads, d] and keys [B, h, w, heads, d] with autograd."""
        grid = (features.shape[2], features.shape[3])
        encoded = rotate(self.image_encoder(image).permute(0, 2, 3, 1), self._angles(image, slice(None)))
        encoded = encoded.to(image.dtype).permute(0, 3, 1, 2)
        queries = F.adaptive_avg_pool2d(self.query_encoder(encoded), size)
        queries = self.cross_decode.conv2d(queries).permute(0, 2, 3, 1)
        keys = F.adaptive_avg_pool2d(self.key_encoder(encoded), grid)
        return self._split_heads(self._project_queries(queries)), self._keys(keys, features)

    def _streamed(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute the same as `_recorded` in bounded memory, without gradients."""
        (B, _, H, W), grid = image.shape, (features.shape[2], features.shape[3])
        pixels = image.flatten(2).transpose(1, 2)  # [B, H*W, 3]
        encoded, scratch = (image.new_empty(B, H * W, self.chs) for _ in range(2))
        encode(self.image_encoder, lambda tile: pixels[:, tile], encoded, scratch)
        for tile in tiles(H * W, encoded, multiple=W):
            angles = self._angles(image, slice(tile.start // W, tile.stop // W)).flatten(0, 1)
            encoded[:, tile] = rotate(encoded[:, tile], angles)
        encode(self.key_encoder, lambda tile: encoded[:, tile], scratch)
        keys = self._keys(F.adaptive_avg_pool2d(_as_image(scratch, H, W), grid), features)
        encode(self.query_encoder, lambda tile: encoded[:, tile], encoded, scratch)
        del scratch
        if size != (H, W):
            encoded = F.adaptive_avg_pool2d(_as_image(encoded, H, W), size).permute(0, 2, 3, 1).contiguous()
        queries = encoded.view(B, *size, self.chs)
        self._decode_in_place(queries)
        return self._split_heads(queries), keys

    def _decode_in_place(self, queries: Tensor) -> None:
        """Apply the 3×3 convolution and the projection to pooled queries [B, *size, chs], a few rows at a time."""
        above = torch.zeros_like(queries[:, :1])
        H, W = queries.shape[1:3]
        for tile in tiles(H * W, queries, multiple=4 * W):
            top, bottom = tile.start // W, tile.stop // W
            below = queries[:, bottom : bottom + 1] if bottom < H else torch.zeros_like(above)
            rows = torch.cat([above, queries[:, top:bottom], below], 1).permute(0, 3, 1, 2)
            above = queries[:, bottom - 1 : bottom].clone()
            decoded = F.conv2d(rows, self.cross_decode.conv2d.weight, padding=(0, 1)).permute(0, 2, 3, 1)
            queries[:, top:bottom] = self._project_queries(decoded)

    def _keys(self, pooled: Tensor, features: Tensor) -> Tensor:
        """Join the encoded image [B, chs, h, w] with the embedded features: [B, h, w, heads, d]."""
        working = features.to(torch.promote_types(features.dtype, torch.float32))
        embedded = self.key_features_encoder(F.normalize(working, dim=1).to(features.dtype))
        keys = self.aggregation(torch.cat([pooled, embedded], 1)).permute(0, 2, 3, 1)
        return self._split_heads(self._projected(keys, self.cross_decode.cross_attn.norm_k, 1))

    def _project_queries(self, queries: Tensor) -> Tensor:
        return self._projected(queries, self.cross_decode.cross_attn.norm_q, 0)

    def _projected(self, x: Tensor, norm: nn.RMSNorm, part: int) -> Tensor:
        """Normalise [..., chs] and project it with the attention's matrix number ``part``."""
        attention = self.cross_decode.cross_attn.attention
        matrix, bias = attention.in_proj_weight.chunk(3)[part], attention.in_proj_bias.chunk(3)[part]
        return F.linear(F.rms_norm(x, (self.chs,), norm.weight, _EPS), matrix, bias)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, self.chs // self.heads)

    def _angles(self, image: Tensor, rows: slice) -> Tensor:
        """Angles of the rotary embedding for some rows of the image: [rows, W, chs], at least float32."""
        H, W = image.shape[2:]
        dtype = torch.promote_types(image.dtype, torch.float32)
        ys, xs = (torch.linspace(0, 1, n, dtype=dtype, device=image.device) for n in (H, W))
        return self.rope.angles(ys[rows], xs)

    def _images_at_once(self, image: Tensor) -> int:
        """Number of images to encode at once: one on a CPU, so that results do not depend on the batch."""
        encoded = self.chs * image.shape[2] * image.shape[3] * image.element_size()
        return 1 if image.device.type == "cpu" else max(1, _IMAGES_BYTES // encoded)

    def _check(self, features: Tensor, values: Tensor, image: Tensor, size: tuple[int, int]) -> None:
        dtype = self.rope.freqs.dtype
        if features.ndim != 4 or min(features.shape[2:]) < 2 or features.dtype != dtype or not features.numel():
            raise ValueError(
                f"features: got {tuple(features.shape)} {features.dtype}, need [B, C, h, w] of the weights' {dtype}, "
                "h and w at least 2: the border is reflected"
            )
        B, _, h, w = features.shape
        agree = values.ndim == 4 and (values.shape[0], *values.shape[2:]) == (B, h, w)
        if not (agree and values.is_floating_point() and values.numel()):
            raise ValueError(
                f"values: got {tuple(values.shape)} {values.dtype}, need [{B}, k, {h}, {w}] as features, floating, "
                "not empty"
            )
        if image.ndim != 4 or image.shape[:2] != (B, 3) or image.dtype != dtype or not image.numel():
            raise ValueError(
                f"image: got {tuple(image.shape)} {image.dtype}, need [{B}, 3, H, W] of the weights' {dtype}, "
                "normalised, not empty"
            )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: got {size}, need height and width of at least 1")


def _as_image(pixels: Tensor, H: int, W: int) -> Tensor:
    """[B, H*W, chs] -> [B, chs, H, W], a view."""
    return pixels.view(len(pixels), H, W, -1).permute(0, 3, 1, 2)
