"""Joint bilateral upsampling: with weights for any backbone, with FeatUp's weights, or training-free."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from densefeat.torch.bilateral import StageSettings, pooled_to_twice, resize, settings_of, stages_to
from kernels.dispatch import Kind
from kernels.jbu import (
    Codes,
    JBUStack,
    Quantization,
    bilateral_codes,
    bilateral_stage,
    explain,
    learned_codes,
    learned_stage,
)
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import load_strict, read_metadata, read_state_dict, state_digest
from pipeline.features.provenance import check_pairing
from pipeline.upsamplers.checks import check_images, check_smallest, checked_basis
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.interface import Facts, Folding, LinearUpsampler
from schemas.upsamplers import JBUOptions

__all__ = ["JBU", "NARROW", "WIDE"]

_WITHDRAWN = "universal"  # bundled weights of earlier versions, in place of a checkpoint
# Other parts of published checkpoints, used only in training: backbone, attention downsampler, uncertainty.
_TRAINING_ONLY = ("model", "downsampler", "scale_net")
_RADIUS = 3  # of the published stages, and of narrow ones
_FINAL_WEIGHT = 0.1  # published: how much of the final 1×1 convolution is added to the last stage

# Settings of the training-free stages, which take features to 2, 4, 8 … times their resolution.
# Narrow: chosen by eye on the first three components of EfficientNet-Lite0's features (14×14 -> 224) of COCO photos,
# over σ_spatial 1…3 pixels × σ_range 0.05…0.2. At (1, 0.05) the low-res grid is visible; at σ_spatial 3, or 2 and more
# on stripes, texture leaks into the features and small objects fade; at σ_range 0.2 they no longer follow edges.
NARROW = (StageSettings(_RADIUS, 1.5, 0.1),)
# Wide: chosen by linear probes with EfficientNet-Lite0, ViT-Ti/16 and ViT-S/14 (benchmarks/upsamplers/jbu_settings.py).
# Wide kernels in the first two stages gain most, and cost little, because these stages have few pixels. Each of these
# pixels is a mean over an area: their colours differ less, so that a smaller σ_range tells regions apart.
WIDE = (StageSettings(5, 2.5, 0.05), StageSettings(7, 3.5, 0.05), *NARROW)


class JBU(LinearUpsampler):
    """Joint bilateral upsampling in ×2 stages: learned (FeatUp, arXiv 2403.10516), or training-free.

    FeatUp's weights work only with the backbone that they were trained on; those of ``jobs/train_upsampler.py`` without
    the final convolution depend on the image alone, and work with any. Training-free: as many stages as needed to
    reach ``size``, each with Kopf et al.'s bilateral kernel on RGB in [0, 1]. With weights: four stages, so ×16. In
    both cases a final bilinear interpolation produces exactly ``size``. It also covers factors beyond ×16, and ignores
    the image.

    Args:
        stack: learned parameters; None means training-free.
        settings: of the training-free stages, see `densefeat.torch.bilateral.settings_of`.
    """

    name = "jbu"
    facts = Facts(
        weights="optional",
        channels="any; with FeatUp's weights, theirs",
        scale="×2 per stage, as many as needed; with weights ×16",
        guidance="the image, pooled to each stage's size",
        pca="exact: applied first",
    )

    smallest_grid = _RADIUS // 2 + 1  # upsampled ×2, the border can be reflected; wide kernels adapt (`settings_of`)

    def __init__(self, stack: JBUStack | None = None, settings: Sequence[StageSettings] = NARROW) -> None:
        super().__init__()
        self.stack = None if stack is None else stack.requires_grad_(False)
        self.settings = tuple(settings)

    @classmethod
    @override
    def from_options(cls, options: JBUOptions, weights: str | None, backbone: Backbone) -> "JBU":
        if weights is None:
            return cls(settings=WIDE if options.jbu_kernels == "wide" else NARROW)
        if weights == _WITHDRAWN:
            raise JobError(
                f"--upsampler-weights {weights}: these bundled weights are no longer included, because training-free "
                "jbu is better on every backbone measured: omit the option"
            )
        if options.jbu_kernels is not None:
            raise JobError(
                f"--jbu-kernels {options.jbu_kernels}: with --upsampler-weights {weights}, kernels are learned: omit it"
            )
        check_pairing(weights, cls.name, backbone)
        return cls.from_weights(weights, backbone.num_chs)

    @classmethod
    def from_weights(cls, uri: str, num_chs: int) -> "JBU":
        """Load FeatUp's published weights or those of ``jobs/train_upsampler.py``, strictly.

        Args:
            uri: checkpoint, local or remote. Names may have the prefix ``upsampler.``; tensors used only in training
                (``model.*``, ``downsampler.*``, ``scale_net.*``) are skipped. The final convolution may be missing
                only if the file's metadata has ``final`` "off".
            num_chs: channels of the backbone's features.

        Raises:
            JobError: the file is unreadable; tensors are missing, unexpected or of the wrong shape; or the weights
                are for another number of channels.
        """
        state = _upsampler_state(read_state_dict(uri))
        final = state.get("fixup_proj.1.weight")
        if final is not None and final.shape[0] != num_chs:
            raise JobError(
                f"JBU weights {uri} are for features of {final.shape[0]} channels, the backbone outputs {num_chs}. "
                "Choose the weights trained for this backbone, or none."
            )
        stack = JBUStack(None if read_metadata(uri).get("final") == "off" else num_chs)
        load_strict(stack, state, what=f"JBU weights {uri}")
        return cls(stack)

    @override
    def identity(self) -> dict[str, object]:
        """Return the name and the weights' digest, or the training-free parameters."""
        if self.stack is not None:
            return {"name": self.name, "weights": state_digest(self.stack.state_dict())}
        stages: list[dict[str, object]] = [stage._asdict() for stage in self.settings]
        return {"name": self.name, **(stages[0] if len(stages) == 1 else {"stages": stages})}

    @override
    def last_step(self) -> dict[str, object] | None:
        return self.identity() if self.stack is None else None

    @override
    def fold(self, mean: Tensor, components: Tensor) -> Folding:
        """Fold in the basis and the final convolution Y = U + 0.1·(W·U + b), if any."""
        mean, components = checked_basis(mean, components)
        with torch.no_grad():
            projection, offset = self.through_final(components.T)
        return Folding(projection.float().contiguous(), (offset - components @ mean).float())

    def through_final(self, projection: Tensor) -> tuple[Tensor, Tensor]:
        """Move a projection of the output before the stages: ``apply_final(U(X)) · P == U(X · Q) + offset``.

        Args:
            projection: P, [..., C, k], floating.

        Returns:
            Q [..., C, k] and offset [..., k], with P's dtype and device; differentiable with respect to the
            convolution.

        Raises:
            ValueError: the final convolution has another number of channels.
        """
        final = None if self.stack is None else self.stack.final
        if final is None:
            return projection, projection.new_zeros(*projection.shape[:-2], projection.shape[-1])
        if final.in_channels != projection.shape[-2]:
            raise ValueError(f"projection: got {projection.shape[-2]} channels, need the weights' {final.in_channels}")
        assert final.bias is not None
        weight, bias = (_FINAL_WEIGHT * parameter.to(projection) for parameter in (final.weight, final.bias))
        return projection + weight[:, :, 0, 0].T @ projection, bias @ projection  # (I + 0.1 W)ᵀ P

    @override
    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample without the final convolution, which `fold` moves into the projection."""
        check_images(low, images, size)
        check_smallest(_grid(low), self.smallest_grid)
        pixels = self._pixels(images)
        for number in range(self._stage_count(_grid(low), size)):
            low = self._stage(number, low, pixels)
        return resize(low, size)

    @override
    def explain(self, device: torch.device) -> str:
        source = torch.float16 if device.type == "cuda" else torch.float32
        radius = max(stage.radius for stage in self.settings) if self.stack is None else _RADIUS
        return str(explain(Kind(device, source), Kind(device, torch.float32), radius=radius))  # the guidance is float32

    @override
    def can_quantize(self, low: tuple[int, int], size: tuple[int, int]) -> bool:
        """True if the last stage outputs exactly ``size``, so that no interpolation follows."""
        stages = self._stage_count(low, size)
        return stages > 0 and (low[0] << stages, low[1] << stages) == size

    @override
    def forward_codes(self, low: Tensor, images: Tensor, size: tuple[int, int], quantization: Quantization) -> Codes:
        """Upsample; the last stage's kernel writes codes."""
        check_images(low, images, size)
        check_smallest(_grid(low), self.smallest_grid)
        if not self.can_quantize(_grid(low), size):
            raise NotImplementedError(f"jbu quantizes only if its last stage outputs exactly the size {size}")
        high, pixels = low, self._pixels(images)
        last = self._stage_count(_grid(low), size) - 1
        for number in range(last):
            high = self._stage(number, high, pixels)
        guidance = pooled_to_twice(pixels, high)
        if self.stack is None:
            radius, sigma_spatial, sigma_range = settings_of(last, self.settings, _grid(high))
            return bilateral_codes(high, guidance, sigma_spatial, sigma_range, radius, quantization)
        return learned_codes(high, guidance, self.stack.stages[last], quantization)

    def apply_stages(self, source: Tensor, pixels: Tensor) -> Tensor:
        """Run the four learned stages: [B, k, h, w] and a normalised image [B, 3, H, W], floating -> [B, k, 16h, 16w].

        Raises:
            ValueError: this upsampler is training-free and has no stages.
        """
        if self.stack is None:
            raise ValueError("stack: got None, need learned weights: the training-free upsampler has no stages")
        for number in range(len(self.stack.stages)):
            source = self._stage(number, source, pixels)
        return source

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 RGB -> guidance: scaled to [0, 1], or ImageNet-normalised for learned weights."""
        return images.float() / 255 if self.stack is None else imagenet_normalised(images)

    def _stage_count(self, low: tuple[int, int], size: tuple[int, int]) -> int:
        return stages_to(low, size) if self.stack is None else len(self.stack.stages)

    def _stage(self, number: int, source: Tensor, pixels: Tensor) -> Tensor:
        guidance = pooled_to_twice(pixels, source)
        if self.stack is None:
            radius, sigma_spatial, sigma_range = settings_of(number, self.settings, _grid(source))
            return bilateral_stage(source, guidance, sigma_spatial, sigma_range, radius)
        return learned_stage(source, guidance, self.stack.stages[number])

    def apply_final(self, features: Tensor) -> Tensor:
        """Add the final convolution, if any, to all C channels [B, C, H, W]: Y = U + 0.1·(W·U + b)."""
        final = None if self.stack is None else self.stack.final
        if final is None:
            return features
        if final.in_channels != features.shape[1]:
            raise ValueError(f"features: got {features.shape[1]} channels, need the weights' {final.in_channels}")
        assert final.bias is not None
        mixed = F.conv2d(features, final.weight.to(features.dtype), final.bias.to(features.dtype))
        return features + _FINAL_WEIGHT * mixed

    def forward_full(self, features: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample all C channels, including the final convolution.

        Args:
            features: [B, C, h, w], floating, neither projected nor centred.
            images: [B, 3, H, W] uint8 RGB.
            size: height and width of the output.

        Returns:
            [B, C, *size], dtype of ``features``.

        Raises:
            ValueError: an argument is not as above.
        """
        return self.apply_final(self.forward(features, images, size))


def _upsampler_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the upsampler's tensors without prefix; unknown names are kept for `load_strict` to report."""
    kept = {name: tensor for name, tensor in state.items() if name.split(".", 1)[0] not in _TRAINING_ONLY}
    if not any(name.startswith("upsampler.") for name in kept):
        return kept
    # If some names have the prefix, a name without it is not one of the upsampler's tensors.
    return {n.removeprefix("upsampler.") if n.startswith("upsampler.") else f"<no prefix> {n}": kept[n] for n in kept}


def _grid(features: Tensor) -> tuple[int, int]:
    return features.shape[2], features.shape[3]
