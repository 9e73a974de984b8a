"""Joint bilateral upsampling in plain torch: the definition every other implementation is tested against.

One stage doubles the resolution of its source: it makes an adaptive kernel per output pixel from the guidance image
(`learned_kernel` or `bilateral_kernel`), and `adaptive_conv_upsample2x` applies it. Everything here is differentiable
and runs in any floating dtype on any device. Arguments are checked by the public operations of the same names,
in `kernels.jbu`.

Kernels are [B, n*n, H, W] with n = 2*radius + 1, taps row-major: tap ``a*n + b`` weighs pixel ``(y + a - radius,
x + b - radius)``, reflected at the border without repeating the edge.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "JBUStack",
    "JBUStage",
    "adaptive_conv_upsample2x",
    "bilateral_kernel",
    "kernel_from_range_products",
    "learned_kernel",
    "reasons_not",
]

FIXUP_WEIGHT = 0.1  # published: how much of the learned correction is added to a normalised kernel


class JBUStage(nn.Module):
    """The parameters of one learned stage, under their published state-dict names.

    FeatUp (arXiv 2403.10516, section 3.2): ``range_temp``, ``sigma_spatial``, ``range_proj.0/.3``, ``fixup_proj.0/.3``.
    It has no ``forward``: `learned_kernel` is what these parameters mean, and implementations of it differ.

    Args:
        guidance_dim: channels of the guidance image.
        key_dim: channels of the keys whose products make the range kernel.
        radius: of the kernel, in output pixels; at least 1.
    """

    def __init__(self, guidance_dim: int = 3, key_dim: int = 32, radius: int = 3) -> None:
        super().__init__()
        self.guidance_dim = guidance_dim
        self.radius = radius
        taps = (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        # Index 2 was a dropout. An identity keeps the published numbering, and cannot be left on by mistake.
        self.range_proj = nn.Sequential(
            nn.Conv2d(guidance_dim, key_dim, 1), nn.GELU(), nn.Identity(), nn.Conv2d(key_dim, key_dim, 1)
        )
        self.fixup_proj = nn.Sequential(
            nn.Conv2d(taps + guidance_dim, taps, 1), nn.GELU(), nn.Identity(), nn.Conv2d(taps, taps, 1)
        )


class JBUStack(nn.Module):
    """The parameters of FeatUp's published stack, under their state-dict names: four stages and a 1×1 convolution.

    Args:
        num_chs: channels of the features the final convolution mixes.
    """

    def __init__(self, num_chs: int) -> None:
        super().__init__()
        self.up1, self.up2, self.up3, self.up4 = (JBUStage() for _ in range(4))
        self.fixup_proj = nn.Sequential(nn.Identity(), nn.Conv2d(num_chs, num_chs, 1))  # published index: 1

    @property
    def stages(self) -> tuple[JBUStage, ...]:
        """The stages in order."""
        return self.up1, self.up2, self.up3, self.up4

    @property
    def final(self) -> nn.Conv2d:
        """The final convolution."""
        final = self.fixup_proj[1]
        assert isinstance(final, nn.Conv2d)
        return final


def reasons_not(*tensors: Tensor) -> list[str]:
    """Reasons why these inputs cannot be taken: none, the reference takes whatever the public ops let through."""
    return []


def learned_kernel(guidance: Tensor, stage: JBUStage) -> Tensor:
    """FeatUp's kernel: softmax over key products × spatial Gaussian, normalised, plus a learned correction.

    FeatUp (arXiv 2403.10516), equations 5-7, and the published weights' correction, which is added after
    normalising: weights may be negative and need not sum to 1.

    Args:
        guidance: [B, guidance_dim, H, W], floating, ImageNet-normalised, H and W > radius.
        stage: parameters, in the guidance's dtype and on its device.

    Returns:
        [B, n*n, H, W], dtype of guidance.
    """
    keys = stage.range_proj(guidance)  # [B, key_dim, H, W]
    products = torch.stack([(keys * tap).sum(1) for tap in _shifted(keys, stage.radius)], dim=1)
    return kernel_from_range_products(products, guidance, stage)


def kernel_from_range_products(products: Tensor, guidance: Tensor, stage: JBUStage) -> Tensor:
    """The rest of `learned_kernel`, once each pixel's key has been multiplied with its neighbours'.

    Args:
        products: [B, n*n, H, W], key products by tap.
        guidance: [B, guidance_dim, H, W].
        stage: parameters.

    Returns:
        [B, n*n, H, W], dtype of products.
    """
    range_kernel = torch.softmax(stage.range_temp.exp().clamp(1e-4, 1e4) * products, dim=1)
    offsets = torch.linspace(-1, 1, 2 * stage.radius + 1, dtype=products.dtype, device=products.device)
    squares = offsets.square()
    distances = (squares[:, None] + squares[None, :]).flatten()[:, None, None]  # [n*n, 1, 1], radius = 1
    kernel = range_kernel * torch.exp(-distances / (2 * stage.sigma_spatial.square()))
    kernel = kernel / kernel.sum(1, keepdim=True).clamp_min(1e-7)
    fixup: Tensor = stage.fixup_proj(torch.cat([kernel, guidance], dim=1))
    return kernel + FIXUP_WEIGHT * fixup


def bilateral_kernel(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3) -> Tensor:
    """The training-free kernel: spatial Gaussian × colour Gaussian, normalised over the taps.

    Kopf et al., Joint Bilateral Upsampling (SIGGRAPH 2007), equation 3, with both Gaussians on the output's grid.

    Args:
        guidance: [B, G, H, W], floating and finite, H and W > radius.
        sigma_spatial: in pixels of the guidance; > 0.
        sigma_range: in units of the guidance (Euclidean distance over its channels); > 0.
        radius: of the kernel, in pixels of the guidance.

    Returns:
        [B, n*n, H, W], dtype of guidance; non-negative, sums to 1 over taps.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=guidance.dtype, device=guidance.device)
    squares = offsets.square()
    spatial = (squares[:, None] + squares[None, :]).flatten()[:, None, None] / (2 * sigma_spatial**2)
    colour = torch.stack([(guidance - tap).square().sum(1) for tap in _shifted(guidance, radius)], dim=1)
    return torch.softmax(-spatial - colour / (2 * sigma_range**2), dim=1)


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor) -> Tensor:
    """Upsample ×2 bicubically, then weigh each output pixel's n × n neighbourhood by its own kernel.

    Bicubic with align_corners=False and a = −0.75 (Keys 1981, as PyTorch); reflect padding;
    FeatUp's adaptive convolution (arXiv 2403.10516, equation 4).

    Args:
        source: [B, C, h, w], floating.
        kernel: [B, n*n, 2h, 2w], dtype of source; 2h and 2w > radius.

    Returns:
        [B, C, 2h, 2w], dtype of source.
    """
    radius = math.isqrt(kernel.shape[1]) // 2
    high = F.interpolate(source, scale_factor=2, mode="bicubic", align_corners=False)
    output = torch.zeros_like(high)
    for weight, tap in zip(kernel.unbind(1), _shifted(high, radius), strict=True):
        output = output + weight[:, None] * tap
    return output


def _shifted(image: Tensor, radius: int) -> Iterator[Tensor]:
    """The image as each tap of an n × n window sees it, row-major: n*n views of [B, C, H, W]."""
    H, W = image.shape[-2:]
    padded = F.pad(image, [radius] * 4, mode="reflect")
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            yield padded[..., dy : dy + H, dx : dx + W]
