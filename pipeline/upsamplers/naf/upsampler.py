"""NAF as an upsampler: `pipeline.upsamplers.naf.network` applied to projected features."""

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from densefeat.torch.bilateral import resize
from kernels.dispatch import Kind
from kernels.quantization import Codes, Encoding, Quantization
from kernels.window.neighborhood import explain, neighborhood_codes
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_state_dict, state_digest
from pipeline.features.provenance import check_pairing
from pipeline.upsamplers.checks import check_images, checked_basis
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.interface import Facts, Projected, Stored, Upsampler, with_nonfinite
from pipeline.upsamplers.naf.network import NAF
from schemas.upsamplers import NoOptions

__all__ = ["NAFProjected", "NAFUpsampler", "computed_size"]


def computed_size(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Size at which NAF computes: on each axis, the multiple of the grid nearest to the output's size, at least ×1."""
    height, width = (low * max(1, (2 * high + low) // (2 * low)) for low, high in zip(grid, size, strict=True))
    return height, width


class NAFUpsampler(Upsampler):
    """NAF (arXiv 2511.18452), also with DiveUp's weights: attention that depends on the image alone, for any backbone.

    The network is defined for whole multiples of the grid. For other sizes, it computes at the nearest multiple
    (`computed_size`), and bilinear interpolation gives the output's size. (The published code then dilates the windows
    by the multiple below instead.)

    Args:
        naf: the network, in evaluation mode.
    """

    name = "naf"
    facts = Facts(
        weights="required",
        channels="any multiple of 4",
        scale="any whole multiple; others from the nearest one",
        guidance="the image, up to 4 times the output's size",
        pca="exact: applied first, to 4k channels",
    )

    def __init__(self, naf: NAF) -> None:
        super().__init__()
        self.naf = naf.requires_grad_(False)

    @classmethod
    @override
    def from_options(cls, options: NoOptions, weights: str | None, backbone: Backbone) -> "NAFUpsampler":
        assert weights is not None
        check_pairing(weights, cls.name, backbone)
        return cls.from_weights(weights)

    @classmethod
    def from_weights(cls, uri: str) -> "NAFUpsampler":
        """Load published weights, strictly.

        Raises:
            JobError: the file is unreadable or does not hold NAF's weights.
        """
        try:
            return cls(NAF.from_state(read_state_dict(uri)))
        except JobError as error:
            raise JobError(f"{uri}: {error}") from error

    @override
    def identity(self) -> dict[str, object]:
        return {"name": self.name, "weights": state_digest(self.naf.state_dict())}

    @override
    def explain(self, device: torch.device) -> str:
        return str(explain(Kind(device, torch.float16 if device.type == "cuda" else torch.float32)))

    def encode(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode images, once for any number of backbones whose `computed_size` is equal (`NAFProjected.upsample`).

        Args:
            images: [B, 3, H, W] uint8 RGB, of any size, H and W at least 2.
            size: `computed_size` for the features' grid and the output's size.

        Returns:
            Queries [B, *size, heads, d]: float16 on a GPU, else float32. At 448 px they are 206 MB per image in
            float32.

        Raises:
            ValueError: an argument is not as above.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images: got {tuple(images.shape)} {images.dtype}, need [B, 3, H, W] of uint8 RGB")
        pixels = imagenet_normalised(images)
        return self.naf.encode(pixels.half() if pixels.is_cuda else pixels, size)

    @override
    def with_basis(self, mean: Tensor, components: Tensor) -> "NAFProjected":
        """As `Upsampler.with_basis`; C must also be a multiple of the heads."""
        mean, components = checked_basis(mean, components)
        heads, (k, C) = self.naf.heads, components.shape
        if C % heads:
            raise ValueError(f"features: got {C} channels, need a multiple of the {heads} heads, which share them")
        maps = components.view(k, heads, C // heads).transpose(0, 1)
        return NAFProjected(self, maps.contiguous().float(), -(components @ mean).float())


class NAFProjected(Projected):
    """NAF with a PCA basis.

    Heads own equal parts of the channels. Each part is projected by its own part of the basis, to k channels, and the
    heads' outputs are added: this equals upsampling all channels and projecting them.

    Args:
        upsampler: the upsampler.
        maps: the basis by heads, [heads, k, C/heads] float32.
        offset: [k] float32, added after upsampling: minus the projected mean, as weights sum to 1.
    """

    maps: Tensor
    offset: Tensor

    def __init__(self, upsampler: NAFUpsampler, maps: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.register_buffer("maps", maps)
        self.register_buffer("offset", offset)

    @override
    def forward(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        check_images(features, images, size)
        output = features.new_empty(len(features), len(self.offset), *size)
        for part in self._parts(images):
            output[part] = self.upsample(features[part], self._encoded(features, images[part], size), size)
        return output

    def upsample(self, features: Tensor, queries: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample with images that are already encoded.

        Args:
            features: [B, C, h, w] float32, as the backbone returns them.
            queries: from `NAFUpsampler.encode`, at `computed_size` of the features' grid and ``size``.
            size: height and width of the output.

        Returns:
            [B, k, *size] float32: upsampled features, minus the mean, projected on the components.

        Raises:
            ValueError: an argument is not as above.
        """
        needed = computed_size(_grid(features), size)
        if queries.shape[1:3] != needed:
            raise ValueError(f"queries: got {tuple(queries.shape)}, need [B, {needed[0]}, {needed[1]}, heads, d]")
        high = self.upsampler.naf.upsample(queries, self._projected(features), sum_heads=True)
        return resize(high.float() + self.offset[:, None, None], size)

    @override
    def encode(self, features: Tensor, images: Tensor, size: tuple[int, int], encoding: Encoding) -> Stored:
        """Encode for the store; codes are written by the attention's kernel if the size is a multiple of the grid."""
        check_images(features, images, size)
        quantization = encoding.quantization(self.offset)
        if quantization is None or computed_size(_grid(features), size) != size:
            return super().encode(features, images, size, encoding)
        parts = [self._codes(features[part], images[part], size, quantization) for part in self._parts(images)]
        return with_nonfinite(Codes(*map(torch.cat, zip(*parts, strict=True))), {})

    def _codes(self, features: Tensor, images: Tensor, size: tuple[int, int], quantization: Quantization) -> Codes:
        naf, queries = self.upsampler.naf, self._encoded(features, images, size)
        keys = naf.keys(queries, _grid(features))
        return neighborhood_codes(queries, keys, self._projected(features), quantization, naf.window, sum_heads=True)

    def _encoded(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        return self.upsampler.encode(images, computed_size(_grid(features), size))

    def _parts(self, images: Tensor) -> Iterator[slice]:
        """Images to encode at a time."""
        step = self.upsampler.naf.images_at_once(images)
        return (slice(start, start + step) for start in range(0, len(images), step))

    def _projected(self, features: Tensor) -> Tensor:
        """Project to heads × k channels; on a GPU to float16, as the queries."""
        heads, _, share = self.maps.shape
        B, _, h, w = features.shape
        low = torch.einsum("bnchw,nkc->bnkhw", features.reshape(B, heads, share, h, w), self.maps).flatten(1, 2)
        return low.half() if low.is_cuda else low


def _grid(features: Tensor) -> tuple[int, int]:
    return features.shape[2], features.shape[3]
