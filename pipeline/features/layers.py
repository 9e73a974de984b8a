"""The layers of a timm model that give its features: which by default, normalised or not, several on one grid."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.reporting.units import listed

__all__ = [
    "SAM",
    "choice_label",
    "feature_info",
    "has_norm",
    "identity_label",
    "layer_label",
    "on_finest_grid",
    "resolve_layers",
]

# The default layers. A ViT's last block: DINOv2's and DINOv3's linear probes, FeatUp, LiFT and AnyUp take it. Where
# strides differ (ConvNets, Swin), the last stage, of stride 32, is coarse for 224 pixels. Together with the last one of
# at most this stride, it serves a linear probe far better than that one alone: see docs/features.md.
_DEFAULT_STRIDE = 16

# timm declares SAM's input size fixed, but its ViT resizes both position embeddings in each forward pass. Built for
# another size, its shapes would differ from its checkpoints', and no filter in timm adapts those.
SAM = "timm.models.vision_transformer_sam"
# timm rejects norm=True for these: they normalise after pooling, like BEiT.
_NO_NORM = ("timm.models.hiera", "timm.models.hieradet_sam2")


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """timm's description of a model's layers, in order; empty for a model without intermediate features."""
    return list(getattr(model, "feature_info", ()))


def resolve_layers(name: str, model: nn.Module, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Number the layers of a model from 0, in ascending order.

    Args:
        name: of the model, for errors.
        model: a timm model.
        asked: layers, negative ones counted from the end; None: the default of the model's family.

    Raises:
        JobError: the model has no intermediate features, or not these layers; a layer is named twice; or the layers do
            not go together.
    """
    info = feature_info(model)
    if not info or not hasattr(model, "forward_intermediates"):
        raise JobError(
            f"Backbone {name!r}: timm {version('timm')} provides no intermediate features for this model. Use another "
            "model, or a newer timm."
        )
    if asked is None:
        return _default_layers([row["reduction"] for row in info])
    if outside := [layer for layer in asked if not -len(info) <= layer < len(info)]:
        rows = [f"{i}: {row['num_chs']} channels, stride {row['reduction']}" for i, row in enumerate(info)]
        raise JobError(
            f"Backbone {name!r}: got layer {outside[0]}, expected {-len(info)} to {len(info) - 1}. Its layers are "
            f"{listed(rows, 48)}."
        )
    layers = tuple(sorted({layer % len(info) for layer in asked}))
    if len(layers) < len(asked):
        raise JobError(f"Backbone {name!r}: got the layers {_numbers(asked)}, which name one twice. Name each once.")
    _check_together(name, model, layers)
    return layers


def _default_layers(strides: Sequence[int]) -> tuple[int, ...]:
    last = len(strides) - 1
    fine = [layer for layer, stride in enumerate(strides) if stride <= _DEFAULT_STRIDE < strides[last]]
    return (fine[-1], last) if fine else (last,)


def _check_together(name: str, model: nn.Module, layers: Sequence[int]) -> None:
    info = feature_info(model)
    if len(layers) > 1 and type(model).__module__ == SAM and layers[-1] == len(info) - 1:
        raise JobError(
            f"Backbone {name!r}: got the layers {_numbers(layers)}, but the last one is given after SAM's neck and the "
            f"others are blocks. Use layer {layers[-1]} alone, or only others."
        )
    strides = [info[layer]["reduction"] for layer in layers]
    if uneven := [stride for stride in strides if stride % min(strides)]:
        raise JobError(
            f"Backbone {name!r}: got the layers {_numbers(layers)}, of strides {_numbers(strides)}: the grid of "
            f"stride {uneven[0]} does not divide into that of stride {min(strides)}. Use layers whose strides do."
        )


def has_norm(model: nn.Module, layers: Sequence[int]) -> bool:
    """Whether to request the model's final norm for these layers."""
    family = type(model).__module__
    if family == SAM:  # its "norm" is the neck: convolutions trained on the last block, meaningless elsewhere
        return layers[-1] == len(feature_info(model)) - 1
    return family not in _NO_NORM


def on_finest_grid(maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Concatenate the features of several layers on the grid of the finest.

    Coarser layers are interpolated bilinearly, with the cells' borders aligned. A ConvNet's grid may reach beyond the
    image, a coarse one farther than a fine one; the rest beyond the finest grid is cut off.

    Args:
        maps: [B, C_i, h_i, w_i] floating, one per layer.
        strides: of each layer, multiples of the smallest.

    Returns:
        [B, ΣC_i, h, w], h and w those of the layer with the smallest stride.
    """
    finest = min(range(len(maps)), key=lambda i: strides[i])
    height, width = maps[finest].shape[2:]

    def placed(features: Tensor, factor: int) -> Tensor:
        if factor > 1:
            features = F.interpolate(features, scale_factor=factor, mode="bilinear")
        return features[..., :height, :width]

    return torch.cat([placed(one, stride // strides[finest]) for one, stride in zip(maps, strides, strict=True)], dim=1)


def layer_label(layer: int | Sequence[int]) -> str:
    """Human-readable name of layers as an identity has them: ``layer 10``, ``layers 8, 9, 10, 11``."""
    return f"layer {layer}" if isinstance(layer, int) else f"layers {_numbers(layer)}"


def identity_label(identity: Mapping[str, Any]) -> str:
    """Where in the model an identity's features are taken: ``layer 10``, ``layer 11 (value, head)``."""
    other = [str(identity[name]) for name in ("facet", "space") if name in identity]
    return layer_label(identity["layer"]) + (f" ({', '.join(other)})" if other else "")


def choice_label(name: str, layer: int | Sequence[int]) -> str:
    """A backbone and its layers as ``--backbones`` takes them: ``resnet18@2``, ``vit_small_patch16_224@10,11``."""
    return f"{name}@{layer}" if isinstance(layer, int) else f"{name}@{','.join(map(str, layer))}"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
