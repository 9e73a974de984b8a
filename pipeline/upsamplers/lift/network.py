"""LiFT: double the resolution of features with a small convolutional network that also sees the image.

Suri et al., LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors (ECCV 2024,
arXiv 2403.14625). A plain torch module: published state-dict names, any floating dtype and device, trainable.

The network mixes channels, so PCA cannot be applied before it, but it can be folded into the last 1×1 convolution
(`LiFT.folded`), which then has k output channels instead of C.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.features.checkpoints import load_strict

__all__ = ["LiFT"]

_IMAGE_CHS = 32  # published: channels of the image branch


class LiFT(nn.Module):
    """The published network, applied once or several times: ×2 each time.

    Application i (from 0) takes features on a grid of 2ⁱ·(h, w) cells and the image at ``patch`` pixels per cell, the
    scale the weights were trained at. An image of another size is resized (bilinear, antialiased). So the second
    application sees the image at twice the size of the first, and an image larger than h·patch × w·patch provides
    real detail for it. The paper applies LiFT once; its successor (arXiv 2601.17950) reports that features drift
    when it is applied repeatedly.

    The published code pools the image branch by 1 (patch 8) or 2 (patch 16). This code pools it to twice the grid
    (adaptive maximum), which gives the same result for those and also works for 14 and any other patch.

    Args:
        num_chs: channels C of the features; even.
        patch: image pixels per cell on both axes, as trained; at least 1. Not recorded in checkpoints.
        iterations: number of applications, at least 1.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(self, num_chs: int, patch: int, iterations: int = 1) -> None:
        super().__init__()
        if num_chs < 2 or num_chs % 2:
            raise ValueError(f"num_chs: got {num_chs}, need an even number of channels: the network halves them")
        if patch < 1:
            raise ValueError(f"patch: got {patch}, need the image pixels a feature cell covers, e.g. 8, 14 or 16")
        if iterations < 1:
            raise ValueError(f"iterations: got {iterations}, need at least 1")
        self.num_chs, self.patch, self.iterations = num_chs, patch, iterations
        self.image_convs_1 = nn.Sequential(*_halving(3), *_halving(_IMAGE_CHS))
        self.image_convs_2 = nn.Sequential(*_halving(_IMAGE_CHS))
        self.up1 = _Up(num_chs)
        self.outc = nn.Conv2d(num_chs // 2, num_chs, 1)
        self.folded_outc: nn.Conv2d | None = None

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], *, patch: int, iterations: int = 1, num_chs: int | None = None
    ) -> "LiFT":
        """Build the network from a checkpoint's tensors, in evaluation mode, float32, channels_last, on the CPU.

        Args:
            state: name -> tensor, every tensor of the network; all names may have the prefix ``module.``.
            patch: as for the class.
            iterations: as for the class.
            num_chs: expected channels of the features; None accepts the checkpoint's number.

        Raises:
            JobError: tensors are missing, unexpected or of the wrong shape; or the weights are for another number of
                channels.
            ValueError: ``patch`` or ``iterations`` is out of range.
        """
        if all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        made_for = _channels(state)
        if num_chs not in (None, made_for):
            raise JobError(
                f"LiFT weights are for features of {made_for} channels, the backbone outputs {num_chs}. "
                "Choose the weights trained for this backbone."
            )
        lift = cls(made_for, patch, iterations)
        load_strict(lift, state, what=f"weights into LiFT for {made_for} channels")
        # channels_last is 20% faster on one CPU core. Folding batch normalisation into the convolutions gained only 1
        # to 4%, not worth a second set of state-dict names.
        return lift.eval().to(memory_format=torch.channels_last)

    @property
    def out_chs(self) -> int:
        """Channels of the output: C, or k once a basis is folded in."""
        return self.num_chs if self.folded_outc is None else self.folded_outc.out_channels

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Upsample by 2 to the power of ``iterations``.

        Args:
            features: [B, C, h, w], in the parameters' dtype, not empty.
            image: [B, 3, H, W], same dtype, ImageNet-normalised, of any size, covering the same area as ``features``.

        Returns:
            [B, out_chs, h·2ⁿ, w·2ⁿ] with n = ``iterations``, dtype of ``features``.

        Raises:
            ValueError: an argument is not as above.
        """
        self._check(features, image)
        for step in range(self.iterations):
            last = step == self.iterations - 1
            readout = self.folded_outc if last and self.folded_outc is not None else self.outc
            features = readout(self.inner(features, image))
        return features

    def folded(self, mean: Tensor, components: Tensor) -> "LiFT":
        """Fold a PCA basis into the last 1×1 convolution, for the last application only.

        ``lift.folded(mean, components)(x, image) == components @ (lift(x, image) - mean)`` up to rounding, at the cost
        of k channels instead of C. Weights are combined in float64.

        Args:
            mean: [C], floating.
            components: [k, C], floating.

        Returns:
            A copy with k output channels; this network is unchanged.

        Raises:
            ValueError: the shapes do not agree with each other and with C, or a basis is already folded in.
        """
        if self.folded_outc is not None:
            raise ValueError(f"folded: got a network that makes {self.out_chs} components already, need one without")
        if mean.shape != (self.num_chs,) or components.ndim != 2 or components.shape[1] != self.num_chs:
            raise ValueError(
                f"components: got mean {tuple(mean.shape)} and components {tuple(components.shape)}, need [C] and "
                f"[k, C] with the weights' C = {self.num_chs}"
            )
        basis, centre = components.detach().double().cpu(), mean.detach().double().cpu()
        weight, bias = self.outc.weight.detach(), self.outc.bias
        assert bias is not None
        folded = nn.Conv2d(self.num_chs // 2, len(basis), 1, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            folded.weight.copy_((basis @ weight[:, :, 0, 0].double().cpu())[:, :, None, None])
            assert folded.bias is not None
            folded.bias.copy_(basis @ (bias.detach().double().cpu() - centre))
        result = copy.deepcopy(self)
        result.folded_outc = folded.requires_grad_(weight.requires_grad).train(self.training)
        return result

    def inner(self, features: Tensor, image: Tensor) -> Tensor:
        """Apply the network once, without the last convolution; arguments as for `forward`: [B, C/2, 2h, 2w]."""
        h, w = features.shape[2:]
        image = _resized(image, self.patch * h, self.patch * w)
        fine = F.adaptive_max_pool2d(self.image_convs_1(image), (2 * h, 2 * w))
        coarse = self.image_convs_2(fine)  # [B, 32, h, w]
        upsampled: Tensor = self.up1(torch.cat([features, coarse], dim=1), fine)
        return upsampled

    def _check(self, features: Tensor, image: Tensor) -> None:
        dtype = self.outc.weight.dtype
        if features.ndim != 4 or features.shape[1] != self.num_chs or features.dtype != dtype or not features.numel():
            raise ValueError(
                f"features: got {tuple(features.shape)} {features.dtype}, need [B, {self.num_chs}, h, w] of the "
                f"weights' {dtype}, not empty"
            )
        if image.ndim != 4 or image.shape[:2] != (len(features), 3) or image.dtype != dtype or not image.numel():
            raise ValueError(
                f"image: got {tuple(image.shape)} {image.dtype}, need [{len(features)}, 3, H, W] of the weights' "
                f"{dtype}, normalised, not empty"
            )


def _channels(state: Mapping[str, Tensor]) -> int:
    """Number of feature channels that a checkpoint is for."""
    last = state.get("outc.weight")
    if last is None or last.ndim != 4 or last.shape[0] < 2 or last.shape[0] % 2:
        got = "nothing" if last is None else f"shape {tuple(last.shape)}"
        raise JobError(
            f"LiFT weights: got {got} for outc.weight among {len(state)} tensors, expected [C, C/2, 1, 1]. "
            "Check that the weights are LiFT's."
        )
    return last.shape[0]


class _Up(nn.Module):
    """×2: transposed convolution, then two convolutions over its output and the image branch."""

    def __init__(self, num_chs: int) -> None:
        super().__init__()
        joined = num_chs + _IMAGE_CHS
        self.up = nn.ConvTranspose2d(joined, joined // 2, 2, stride=2)
        self.conv_1 = _DoubleConv(joined // 2 + _IMAGE_CHS, num_chs // 2)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        result: Tensor = self.conv_1(torch.cat([self.up(features), image], dim=1))
        return result


class _DoubleConv(nn.Module):
    """Twice: 3×3 convolution without bias, batch normalisation, ReLU."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for chs in (in_chs, out_chs):
            layers += [
                nn.Conv2d(chs, out_chs, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_chs),
                nn.ReLU(inplace=True),
            ]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.double_conv(x)
        return result


def _halving(in_chs: int) -> list[nn.Module]:
    """Layers that halve the resolution, rounding up."""
    conv = nn.Conv2d(in_chs, _IMAGE_CHS, 3, stride=2, padding=1)
    return [conv, nn.BatchNorm2d(_IMAGE_CHS), nn.ReLU(inplace=True)]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[2:] == (height, width):
        return image
    # Filter weights in half precision would lose image detail; float32 is cheap, as the image is small.
    working = image if image.dtype == torch.float64 else image.float()
    resized = F.interpolate(working, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return resized.to(image.dtype)
