"""The recipe of a job: its options, resolved once by the driver, as a value that builds the stages.

Workers get the recipe instead of the options. Detected values (layers counted from the end, the kind of the dataset)
are detected only once, and every stage that is built elsewhere must have the identity of the driver's stage.
"""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.images.batches import BatchLoader
from pipeline.images.decoding.decode import Geometry
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.interface import Upsampler
from schemas.configuration import Facet, Represent, SourceKind, Space
from schemas.options import FeatureConfig

__all__ = ["FeatureRecipe", "ImageRecipe", "Stages", "UpsampleRecipe", "backbone_fields"]


@dataclass(frozen=True, eq=False)
class Stages:
    """The stages that a recipe builds.

    Attributes:
        backbone: pixels to features of C channels.
        upsampler: features to high-resolution features; None for jobs that need only the backbone.
    """

    backbone: Backbone
    upsampler: Upsampler | None = None

    def to(self, device: torch.device) -> "Stages":
        """The same stages, moved to a device."""
        return Stages(self.backbone.to(device), None if self.upsampler is None else self.upsampler.to(device))


@dataclass(frozen=True)
class ImageRecipe:
    """How images are read and placed on the grid of the features.

    Attributes:
        source_kind: how the dataset stores its images.
        image_column: see `pipeline.images.listing.source.Source`.
        geometry: size of the pixels and of the stored features, and how images are fitted to it.
        max_pixels: larger images become failed rows.
        min_side: images with a shorter side become failed rows.
    """

    source_kind: SourceKind
    image_column: str | None
    geometry: Geometry
    max_pixels: int
    min_side: int

    def loader(self, batch_size: int, threads: int) -> BatchLoader:
        """Build the loader that reads and decodes images in batches."""
        return self.loader_maker(batch_size, threads)()

    def loader_maker(self, batch_size: int, threads: int) -> Callable[[], BatchLoader]:
        """A function that builds it, which other processes can unpickle without importing timm."""
        return partial(
            BatchLoader,
            self.geometry,
            batch_size,
            source_kind=self.source_kind,
            image_column=self.image_column,
            max_pixels=self.max_pixels,
            min_side=self.min_side,
            threads=threads,
        )


@dataclass(frozen=True)
class FeatureRecipe:
    """Recipe from images to low-resolution features.

    Attributes:
        images: how images are read.
        backbone: name of the timm model.
        layers: layers of the model, each 0 or more.
        weights: "pretrained", "random", or the URI of a checkpoint.
        space: as for `pipeline.features.backbone.build_backbone`.
        facet: as for `pipeline.features.backbone.build_backbone`.
        backbone_identity: `Backbone.identity` of the backbone that the driver built.
    """

    images: ImageRecipe
    backbone: str
    layers: tuple[int, ...]
    weights: str
    space: Space
    facet: Facet
    backbone_identity: Mapping[str, Any]

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Paths and URIs of the checkpoint files that the stages are built from."""
        return () if self.weights in ("pretrained", "random") else (self.weights,)

    def build(self) -> Stages:
        """Build the stages on the CPU.

        Raises:
            JobError: a stage cannot be built, or differs from the driver's because this machine has other weights.
        """
        size = self.images.geometry.size
        backbone = build_backbone(
            self.backbone, size=size, weights=self.weights, layer=self.layers, space=self.space, facet=self.facet
        )
        _check_identity("backbone", backbone.identity(), self.backbone_identity)
        return Stages(backbone)


@dataclass(frozen=True)
class UpsampleRecipe(FeatureRecipe):
    """Recipe from images to stored high-resolution features.

    Attributes:
        upsampler: a name in `pipeline.upsamplers.build.UPSAMPLERS`.
        upsampler_weights: URI of its checkpoint, if it has one.
        upsampler_options: options of this upsampler.
        upsampler_identity: `Upsampler.identity` of the upsampler that the driver built.
        components: number of PCA components, k.
        dtype: "int8" or "float16".
        error_floor: smallest quantization step, see `pipeline.store.calibration.choose_steps`.
        shard_rows: rows of a shard.
        represent: what the store holds.
        guided: whether an image that guides the last step is stored with each row.
        embedding: number of channels of the images' embeddings; None: they are not stored.
        stored_size: (height, width) of the stored values: those of the features, or of the grid before the last step.
    """

    upsampler: str
    upsampler_weights: str | None
    upsampler_options: object
    upsampler_identity: Mapping[str, Any]
    components: int
    dtype: str
    error_floor: float
    shard_rows: int
    represent: Represent
    guided: bool
    embedding: int | None
    stored_size: tuple[int, int]

    @property
    @override
    def checkpoints(self) -> tuple[str, ...]:
        own = () if self.upsampler_weights is None else (self.upsampler_weights,)
        return (*super().checkpoints, *own)

    @override
    def build(self) -> Stages:
        backbone = super().build().backbone
        upsampler = build_upsampler(self.upsampler, self.upsampler_weights, backbone, self.upsampler_options)
        _check_identity("upsampler", upsampler.identity(), self.upsampler_identity)
        return Stages(backbone, upsampler)


def backbone_fields(config: FeatureConfig, backbone: Backbone) -> dict[str, Any]:
    """The fields of a `FeatureRecipe` that build the backbone again."""
    return {
        "backbone": config.backbone,
        "layers": backbone.layers,
        "weights": config.weights,
        "space": config.space,
        "facet": config.facet,
        "backbone_identity": backbone.identity(),
    }


def _check_identity(stage: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if got != expected:
        raise JobError(
            f"{stage} mismatch on {socket.gethostname()}: got {got}, expected {expected} as on the driver; all nodes "
            "must load the same weights with the same version of timm"
        )
