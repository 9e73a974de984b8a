"""The last layer's features in other spaces: the model's head applied at every position, and a ViT's values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.features.layers import feature_info
from schemas.configuration import Facet, Space

__all__ = ["OutputSpace"]

_TOLERANCE = 1e-3  # of a head's output; heads that know no positions are within 1e-5
# Positions per call of a head or of an attention: CUDA's attention takes batches of at most 65,535.
_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class OutputSpace:
    """A timm model whose features are taken in the space ``"head"``, or from the facet ``"value"``, or both.

    ``"value"``: the values of the last block through its output projection, without the residual connection: what its
    attention adds to a token that attends to itself alone (MaskCLIP: Zhou et al., ECCV 2022). ``"head"``: the model's
    own output if its last block or stage gave the same vector everywhere, namely that of this position. Pooling equal
    vectors changes nothing; final norm and classifier or projection remain. FeatUp's CLIP is ``"head"``; its MaskCLIP
    is both.

    Attributes:
        name: of the model, for errors.
        model: the timm model, with its head if ``space`` is ``"head"``.
        space: ``"layer"`` or ``"head"``.
        facet: ``"token"`` or ``"value"``.
    """

    name: str
    model: Any
    space: Space
    facet: Facet

    @classmethod
    def checked(cls, name: str, model: nn.Module, layers: Sequence[int], space: Space, facet: Facet) -> Self:
        """Check that the model has this space and facet after these layers.

        Raises:
            JobError: the layers are not the last one alone; or the model has no head, or no values.
        """
        asked = "--space head" if space == "head" else "--facet value"
        last = len(feature_info(model)) - 1
        if tuple(layers) != (last,):
            raise JobError(
                f"Backbone {name!r}: got {asked} with layer {', '.join(map(str, layers))}, expected the last layer, "
                f"{last}, alone: the head follows it, and values are those of the last attention. Omit --layer."
            )
        if space == "head" and not (_number(model, "num_classes") or getattr(model, "attn_pool", None) is not None):
            raise JobError(
                f"Backbone {name!r}: got --space head, expected a model with a head: timm has no classifier and no "
                "projection after its last layer. Omit --space, or use a classifier, CLIP (such as "
                "vit_base_patch16_clip_quickgelu_224.openai) or SigLIP."
            )
        if facet == "value" and not _has_values(model):
            raise JobError(
                f"Backbone {name!r}: got --facet value, expected a plain ViT, whose blocks add to each token what "
                f"attention without relative positions gives; timm's {type(model).__name__} is none. Omit --facet, or "
                "use a ViT."
            )
        return cls(name, model, space, facet)

    def __call__(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute the features of a batch.

        Args:
            pixels: [B, 3, H, W], normalised.
            grid: (h, w) of the model's last layer at this size.

        Returns:
            [B, C, h, w], floating. C is the size of the head's output, or in the space ``"layer"`` of a token.

        Raises:
            JobError: the model does not pass a map of this grid to its head.
        """
        if self.space == "layer":
            return _values(self.model, pixels, grid).movedim(-1, 1)
        before = self._before_head(pixels, grid)
        output = self._head(before, before.vectors.flatten(0, 2))
        return output.reshape(*before.vectors.shape[:3], -1).movedim(-1, 1)

    def check_positions(self, pixels: Tensor, grid: tuple[int, int]) -> None:
        """Check that the head gives the same for a map of equal vectors as for a single one of them.

        Args:
            pixels: [1, 3, H, W], normalised.
            grid: as for the call.

        Raises:
            JobError: it does not, so it uses where on the map a vector is; or as the call.
        """
        if self.space == "layer":
            return
        before = self._before_head(pixels, grid)
        vector = before.vectors[:, 0, 0]
        alone, everywhere = (self._head(before, vector, cells) for cells in ((1, 1), grid))
        if not torch.allclose(alone, everywhere, rtol=0, atol=_TOLERANCE * float(alone.abs().max())):
            raise JobError(
                f"Backbone {self.name!r}: got --space head, but this model's head uses where on the map a vector is "
                "(position embeddings in its pooling), so that it has no output at one position alone. Use another "
                "model, such as a ViT trained as CLIP, or omit --space."
            )

    def _before_head(self, pixels: Tensor, grid: tuple[int, int]) -> "_Map":
        """What the model passes to its head."""
        prefix = _number(self.model, "num_prefix_tokens")
        if self.facet == "value":
            return _Map(self.model.norm(_values(self.model, pixels, grid)), "NLC", prefix)
        features = self.model.forward_features(pixels)
        shape = tuple(features.shape) if isinstance(features, Tensor) else (type(features).__name__,)
        if len(shape) == 4:
            form = getattr(self.model, "output_fmt", "NCHW")  # timm's convention
            vectors = features if form == "NHWC" else features.movedim(1, -1)
            if vectors.shape[1:3] == grid:
                return _Map(vectors, form, prefix)
        if len(shape) == 3 and shape[1] == prefix + grid[0] * grid[1]:
            return _Map(features[:, prefix:].reshape(-1, *grid, shape[2]), "NLC", prefix)
        raise JobError(
            f"Backbone {self.name!r}: got {' × '.join(map(str, shape))} before this model's head, expected a map of "
            f"{grid[0]}×{grid[1]} positions, or as many tokens after {prefix} others. Omit --space, or use another "
            "model."
        )

    def _head(self, before: "_Map", vectors: Tensor, cells: tuple[int, int] = (1, 1)) -> Tensor:
        """The head's output for maps of ``cells`` positions, each with one of ``vectors`` [M, C] everywhere: [M, K]."""
        return _in_parts(lambda part: self.model.forward_head(before.filled(part, cells)), vectors)


@dataclass(frozen=True)
class _Map:
    """What a model passes to its head.

    Attributes:
        vectors: [B, h, w, C], of the positions.
        form: the model's own: NLC, NHWC or NCHW.
        prefix: in NLC, number of class, distillation and register tokens before the positions.
    """

    vectors: Tensor
    form: str
    prefix: int

    def filled(self, vectors: Tensor, cells: tuple[int, int]) -> Tensor:
        """Maps of ``cells`` positions in the model's form, each with one of ``vectors`` [M, C] everywhere."""
        if self.form == "NLC":
            return vectors[:, None].expand(-1, self.prefix + cells[0] * cells[1], -1)
        if self.form == "NHWC":
            return vectors[:, None, None].expand(-1, *cells, -1)
        return vectors[:, :, None, None].expand(-1, -1, *cells)


def _in_parts(function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    return torch.cat([function(part) for part in torch.split(vectors, _AT_ONCE)])


def _values(model: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The values of the last block at the positions, after its output projection: [B, h, w, C]."""
    (tokens,) = model.forward_intermediates(
        pixels,
        indices=[len(model.blocks) - 2],
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    block = model.blocks[-1]
    alone = block.norm1(tokens).flatten(0, 1)[:, None]
    # Attention over a single token has the weight 1, whatever its query and key.
    values = _in_parts(block.attn, alone).reshape(len(pixels), *grid, -1)
    if hasattr(block, "ls1"):
        scaled: Tensor = block.ls1(values)
    else:  # Eva's
        scaled = values if block.gamma_1 is None else values * block.gamma_1
    return scaled


def _has_values(model: nn.Module) -> bool:
    """Whether the last block is one whose values `_values` computes."""
    from timm.models.eva import Eva, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    blocks: Any = getattr(model, "blocks", None)
    known = isinstance(model, VisionTransformer | Eva) and len(blocks) > 1
    return known and type(blocks[-1]) in (Block, EvaBlock)


def _number(model: Any, name: str) -> int:
    return int(getattr(model, name, 0) or 0)
