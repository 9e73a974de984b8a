"""Pixels -> low-res features [B, C, h, w]: any timm model, truncated after the stages or blocks that give them."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.features.checkpoints import load_strict, read_state_dict, state_digest
from pipeline.features.hub import go_offline_if_unreachable
from pipeline.features.layers import feature_info, has_norm, identity_label, on_finest_grid, resolve_layers
from pipeline.features.output_space import OutputSpace
from pipeline.features.timm_models import check_name, classifiers, converted, create_model, pretrained_state
from schemas.configuration import Facet, Space

__all__ = ["Backbone", "build_backbone"]

_logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A frozen timm model that returns the features of one layer, or of several, concatenated on the finest grid.

    The features are taken *after the model's final norm* where timm has one for that layer: at every block of a plain
    ViT (the practice of DINOv2, ``get_intermediate_layers(norm=True)``), at the last stage of Swin, ConvNeXt and RDNet
    (where timm's ``norm_pre`` may be the identity), and after SAM's neck at its last block (256 channels; inner blocks
    are raw). A ViT that pools by averaging (BEiT, EVA-02, MAE fine-tunes) normalises only the pooled features, so its
    dense features are raw. Class, distillation and register tokens are dropped. With ``output``, the last layer's
    features are in the space of the model's head, or its values.

    Always in evaluation mode and without gradients: the same batch on the same device gives the same features.

    Attributes:
        name: timm model name as requested, ``arch`` or ``arch.tag``.
        layers: indices of the layers, non-negative and ascending, as in timm's ``feature_info``.
        num_chs: C, channels of the features: of all layers together.
        reduction: stride of the features in input pixels: the smallest of the layers'.
        size: (H, W) in pixels that ``forward`` accepts.
        grid: (h, w) of the features. A ConvNet rounds up: h = ceil(H / reduction).
        norm: whether the model's final norm was requested (see above for where one exists); a head has its own.
        output: how the features are taken from the last layer; None: as above.
        published: whether the weights are those that timm publishes.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        layers: tuple[int, ...],
        size: tuple[int, int],
        norm: bool,
        output: OutputSpace | None = None,
    ) -> None:
        """Wrap a timm model, with its head only if ``output`` uses it.

        Use `build_backbone` to build from a name; it documents the errors.
        """
        super().__init__()
        self.name, self.layers, self.size, self.norm, self.output = name, layers, size, norm, output
        self.published = False
        # NHWC convolutions: lite0 takes 0.7 of the time on a CPU, and tensor cores prefer them on a GPU.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        cfg: dict[str, Any] = vars(model)["pretrained_cfg"]
        self._mean, self._std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.register_buffer("mean", 255 * torch.tensor(self._mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(self._std).view(1, 3, 1, 1), persistent=False)
        self._strides = [int(feature_info(model)[layer]["reduction"]) for layer in layers]
        self.reduction = min(self._strides)
        self.grid: tuple[int, int] = (-(-size[0] // self.reduction), -(-size[1] // self.reduction))
        with torch.inference_mode():
            black = self.normalise(torch.zeros(1, 3, *size, dtype=torch.uint8))
            try:  # one image: the only reliable source of every family's strides, paddings and necks
                maps = self._maps(black)
                if output is not None:
                    output.check_positions(black, self.grid)
            except JobError:
                raise
            except Exception as error:  # timm's families reject a size with AssertionError, RuntimeError, ValueError …
                raise _refused_size(name, size, error) from error
        for features, stride in zip(maps, self._strides, strict=True):
            _check_even(name, features.shape[2:], size, stride)
        self.num_chs: int = sum(features.shape[1] for features in maps)

    @property
    def layer(self) -> int | list[int]:
        """The layer, or the list of several: as in the identity."""
        return self.layers[0] if len(self.layers) == 1 else list(self.layers)

    @property
    def license(self) -> str | None:
        """License of the published weights, as timm names it; None if it does not say, or the weights are others."""
        license_name: str | None = vars(self.model)["pretrained_cfg"].get("license") if self.published else None
        return license_name

    @property
    def label(self) -> str:
        """Human-readable name: ``resnet18 at layer 2``, ``vit_tiny_patch16_224 at layer 11 (value, head)``."""
        return f"{self.name} at {identity_label(self._place)}"

    @property
    def _place(self) -> dict[str, object]:
        """Where in the model the features are taken, as in the identity: defaults of `OutputSpace` are left out."""
        chosen = {} if self.output is None else {"facet": self.output.facet, "space": self.output.space}
        return {"layer": self.layer, **{name: one for name, one in chosen.items() if one not in ("token", "layer")}}

    @functools.cached_property
    def digest(self) -> str:
        """`pipeline.features.checkpoints.state_digest` of the weights, without an unused head; computed once."""
        return state_digest(self.model.state_dict())

    def identity(self) -> dict[str, object]:
        """All that features depend on besides the pixels, JSON-serialisable, for the configuration hash."""
        return {
            "name": self.name,
            **self._place,
            "weights": self.digest,
            "mean": list(self._mean),
            "std": list(self._std),
            "norm": self.norm,
        }

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode regardless of the containing module: features must not depend on the batch."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise pixels as in the model's training: ``(images / 255 - mean) / std``.

        Args:
            images: [B, 3, H, W] uint8 RGB, on the backbone's device; any H and W.

        Returns:
            [B, 3, H, W] float32, channels_last.
        """
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch; in bfloat16 autocast on a GPU, in float32 on a CPU.

        Args:
            images: [B, 3, H, W] uint8 RGB, (H, W) = ``self.size``, on the backbone's device.

        Returns:
            [B, C, h, w] float32, contiguous, detached; not an inference tensor, so autograd may save it.

        Raises:
            ValueError: the dtype or shape is not as above.
        """
        return self._computed(images, embed=False)[0]

    def with_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and one vector for each image, from the same pass: [B, D] float32.

        It is the pooled features that the model's own classifier would take: the class token, or an average or
        attention over positions, as the model was trained. In the space ``"head"`` it is the output of the head.
        """
        features, embedding = self._computed(images, embed=True)
        assert embedding is not None
        return features, embedding

    @functools.cached_property
    def embedding_channels(self) -> int:
        """D of `with_embedding`.

        Raises:
            JobError: the model does not give the same vector along with intermediate features as without them.
        """
        black = self.normalise(torch.zeros(1, 3, *self.size, dtype=torch.uint8, device=self.get_buffer("mean").device))
        with torch.inference_mode():
            _, embedding = self._maps_and_embedding(black, embed=True)
            assert embedding is not None
            alone = self._pooled(self.model.forward_features(black))  # type: ignore[operator]
        if embedding.ndim != 2 or not torch.allclose(embedding, alone, rtol=1e-4, atol=1e-5):
            raise JobError(
                f"Backbone {self.name!r}: got --embedding, but this model's pooled features cannot be computed along "
                "with its dense ones. Omit --embedding, or use another model."
            )
        return int(embedding.shape[1])

    def _computed(self, images: Tensor, *, embed: bool) -> tuple[Tensor, Tensor | None]:
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.size):
            raise ValueError(
                f"images: got {list(images.shape)} {images.dtype}, expected [B, 3, {self.size[0]}, {self.size[1]}] "
                "torch.uint8. Decode to the size that the backbone was built for."
            )
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            maps, embedding = self._maps_and_embedding(self.normalise(images), embed=embed)
            features = maps[0] if len(maps) == 1 else on_finest_grid([one.float() for one in maps], self._strides)
        # Copied outside inference mode: autograd cannot save inference tensors.
        copied = features.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return copied, None if embedding is None else embedding.to(torch.float32, copy=True)

    def _maps_and_embedding(self, pixels: Tensor, *, embed: bool) -> tuple[list[Tensor], Tensor | None]:
        """The features of each layer, and the embedding if requested."""
        if not embed:
            return self._maps(pixels), None
        if self.output is not None:  # a pass of its own: the head is applied to every position before it pools
            return self._maps(pixels), self._pooled(self.model.forward_features(pixels))  # type: ignore[operator]
        final, maps = self._run(pixels, stop_early=False, intermediates_only=False)
        return maps, self._pooled(final)

    def _pooled(self, features: Any) -> Tensor:
        """The model's own pooling, then its head in the space ``"head"``: [B, D]."""
        headless = self.output is None or self.output.space != "head"
        pooled: Tensor = self.model.forward_head(features, pre_logits=headless)  # type: ignore[operator]
        return pooled

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """The features of each layer: [B, C_i, h_i, w_i]. No later layers are computed and no others kept."""
        if self.output is not None:
            return [self.output(pixels, self.grid)]
        maps: list[Tensor] = self._run(pixels, stop_early=True, intermediates_only=True)
        return maps

    def _run(self, pixels: Tensor, **options: bool) -> Any:
        run: Any = self.model.forward_intermediates
        return run(pixels, indices=list(self.layers), norm=self.norm, output_fmt="NCHW", **options)


def build_backbone(
    name: str,
    *,
    size: tuple[int, int],
    weights: str = "pretrained",
    layer: int | Sequence[int] | None = None,
    space: Space = "layer",
    facet: Facet = "token",
) -> Backbone:
    """Build a backbone from a timm model name. Everything else is checked before any weights are fetched.

    A ViT's position embedding is resampled to the grid of ``size`` as in timm (bicubic, antialiased), Swin pads its
    windows, and other models with a fixed size are built for ``size``; a ConvNet accepts any size.

    Args:
        name: timm model, ``arch`` or ``arch.tag`` (``vit_small_patch14_dinov2.lvd142m``). The tag, or timm's default
            tag, also determines the mean and std for normalising pixels.
        size: (H, W) of the images in pixels.
        weights: ``"pretrained"`` (timm downloads them, or finds them in its cache), ``"random"`` (seed 0, for tests
            and benchmarks), or a checkpoint's path or URI, with timm's tensor names or those of an original release
            that timm can convert.
        layer: index into the model's stages (ConvNets, Swin) or blocks (ViTs); negative counts from the end. Several
            indices: their channels are concatenated, see `pipeline.features.layers.on_finest_grid`. None: a ViT's
            last block; of a network whose strides differ, the last layer and the last with a stride of at most 16. With
            a space or facet that is not the default, the last layer alone.
        space: ``"layer"``; or ``"head"``: the model's head at every position, see
            `pipeline.features.output_space.OutputSpace`.
        facet: ``"token"``, the output of a layer; or ``"value"``: the values in the last block of a ViT.

    Returns:
        The backbone, on the CPU.

    Raises:
        JobError: the model, tag or layer is unknown; the layers do not go together; the model does not accept the
            size, or lacks the space or facet; or the weights cannot be fetched or do not match.
    """
    if weights == "pretrained":
        go_offline_if_unreachable()
    check_name(name, weights)
    if min(size) < 1:
        raise JobError(f"Backbone {name!r}: got the size {size}, expected (H, W) in pixels. Give positive numbers.")
    try:
        model = create_model(name, size, head=space == "head")
    except (AssertionError, RuntimeError, ValueError) as error:  # a fixed-size model that does not support this size
        raise _refused_size(name, size, error) from error
    plain = space == "layer" and facet == "token"
    asked = (layer,) if isinstance(layer, int) else layer
    layers = resolve_layers(name, model, asked if asked or plain else (-1,))
    output = None if plain else OutputSpace.checked(name, model, layers, space, facet)
    _check_patches(name, model, size)
    norm = has_norm(model, layers) if plain else space == "head"
    backbone = Backbone(name, model, layers=layers, size=size, norm=norm, output=output)
    if weights == "random":
        _logger.warning("Backbone %s has random weights: its features are meaningless.", name)
        return backbone
    if weights == "pretrained":
        state = pretrained_state(name, size)
    else:
        state = converted(model, read_state_dict(weights), size, weights)
    unused = () if space == "head" else classifiers(model)
    load_strict(model, state, what=f"weights {weights!r} into {name}", ignore_unexpected=unused)
    backbone.published = weights == "pretrained"
    return backbone


def _check_patches(name: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Reject a size that is not a multiple of the patch: timm silently crops it in models built for the size."""
    if not vars(model)["pretrained_cfg"].get("fixed_input_size"):
        return  # ConvNets; where they have "patches", these overlap
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = (patch, patch) if isinstance(patch, int) else patch
    axes = zip(("height", "width"), size, patch, strict=True)
    wrong = [f"{axis} {length} use {_multiples(length, step)}" for axis, length, step in axes if length % step]
    if wrong:
        raise JobError(
            f"Backbone {name!r}: got images of {size[0]}×{size[1]} pixels, expected multiples of its patch "
            f"({patch[0]}×{patch[1]}). For {', for '.join(wrong)}."
        )


def _multiples(length: int, step: int) -> str:
    below = length // step * step
    return f"{below} or {below + step}" if below else str(step)


def _check_even(name: str, grid: Sequence[int], size: tuple[int, int], stride: int) -> None:
    if tuple(grid) != (even := tuple(-(-length // stride) for length in size)):
        raise JobError(
            f"Backbone {name!r}: got a grid of {grid[0]}×{grid[1]} features from {size[0]}×{size[1]} pixels, expected "
            f"{even[0]}×{even[1]} at its stride of {stride}: the grid does not cover the image evenly, so features "
            "cannot be aligned with it. Use multiples of the stride, or another model."
        )


def _refused_size(name: str, size: tuple[int, int], error: Exception) -> JobError:
    return JobError(
        f"Backbone {name!r}: got images of {size[0]}×{size[1]} pixels, on which it does not run "
        f"({type(error).__name__}: {error}), expected a size that it accepts. Its pretrained size works, and often any "
        "multiple of 32."
    )
