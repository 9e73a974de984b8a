"""The configuration of a store from the options of a job, and options that a resumed store decides."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from densefeat.layout import ZSTD_LEVEL, step_sha256
from densefeat.storage.guidance import QUALITY
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.pca import Basis
from pipeline.run.recipe import UpsampleRecipe
from pipeline.store.fitted import Fitted
from pipeline.upsamplers.interface import Upsampler
from pipeline.upsamplers.jbu import JBU, WIDE
from pipeline.upsamplers.multiview.upsampler import WIDE_FINISH
from schemas.configuration import (
    GeometryConfiguration,
    PcaConfiguration,
    SourceConfiguration,
    StorageConfiguration,
    StoreConfiguration,
)
from schemas.options import UpsampleConfig

__all__ = ["compact_attribute", "store_configuration", "stored_size", "with_stored_defaults"]


def store_configuration(
    config: UpsampleConfig,
    source: SourceConfiguration,
    recipe: UpsampleRecipe,
    basis: Basis | None,
    fitted: Fitted | None,
    *,
    resumed: bool,
) -> StoreConfiguration:
    """Everything that the features of the store depend on.

    Args:
        config: options of the job.
        source: the images.
        recipe: of the features.
        basis: that was given; None: it is to be fitted.
        fitted: what was fitted to the images of another store, and is given; None: nothing but ``basis`` is.
        resumed: whether the store exists.
    """
    geometry = recipe.images.geometry
    floor = recipe.error_floor if recipe.dtype == "int8" else None
    configuration = StoreConfiguration(
        source=source,
        backbone=recipe.backbone_identity,
        geometry=GeometryConfiguration(
            geometry.size, geometry.fit, geometry.output_size, recipe.images.max_pixels, recipe.images.min_side
        ),
        pca=_pca_configuration(config, recipe.components, basis, source.rows, resumed=resumed),
        upsampler=recipe.upsampler_identity,
        storage=StorageConfiguration(
            recipe.dtype,
            recipe.shard_rows,
            ZSTD_LEVEL,
            floor,
            represent=None if recipe.represent == "dense" else recipe.represent,
            embedding=recipe.embedding,
            guidance_quality=QUALITY if recipe.guided else None,
            steps=None if fitted is None else step_sha256(fitted.step),
        ),
    )
    fit = None if fitted is None else fitted.upsampler
    return configuration if fit is None else configuration.with_fit(fit.identity())


def _pca_configuration(
    config: UpsampleConfig, k: int, basis: Basis | None, rows: int, *, resumed: bool
) -> PcaConfiguration:
    if basis is not None:
        return PcaConfiguration(k, basis=basis.truncated(k).digest)
    images = min(config.pca_images or rows, rows)
    if isinstance(config.components, float):
        known = k if resumed else None
        return PcaConfiguration(known, explained_share=config.components, fitted_on_images=images)
    return PcaConfiguration(k, fitted_on_images=images)


def with_stored_defaults(config: UpsampleConfig, stored: StoreConfiguration) -> UpsampleConfig:
    """Options for a resumed store: those that are omitted are the store's, whatever their defaults are by now."""
    adopted: dict[str, Any] = {}
    if config.quality == "high":  # the default
        if config.represent is None:
            adopted["represent"] = stored.storage.represent or "dense"
        if config.error_floor is None and config.dtype == "int8":
            adopted["error_floor"] = stored.storage.error_floor
    if stored.storage.embedding is not None:
        adopted["embedding"] = True
    if config.shard_images is None:
        adopted["shard_images"] = stored.storage.shard_images
    if config.backbone == stored.backbone.get("name"):
        layer = stored.backbone.get("layer")
        if config.layer is None and layer is not None:
            adopted["layer"] = ",".join(map(str, layer)) if isinstance(layer, list) else str(layer)
        if config.components is None:
            adopted["components"] = stored.pca.explained_share or stored.pca.components
    if config.upsampler == stored.upsampler.get("name") == "multiview" and config.views is None:
        adopted["views"] = stored.upsampler["views"]
    if config.jbu_kernels is None and _had_wide_kernels(config, stored.upsampler):
        adopted["jbu_kernels"] = "wide"
    return replace(config, **adopted)


def _had_wide_kernels(config: UpsampleConfig, stored: Mapping[str, Any]) -> bool:
    """Whether the store's upsampler is the one asked for, with wide kernels; those of jbu's weights are learned."""
    if config.upsampler == stored.get("name") == "multiview":
        return bool(stored.get("finish") == JBU(settings=WIDE_FINISH).identity())
    free = config.upsampler == "jbu" and config.upsampler_weights is None
    return free and bool(stored == JBU(settings=WIDE).identity())


def stored_size(config: UpsampleConfig, upsampler: Upsampler, backbone: Backbone) -> tuple[int, int]:
    """(height, width) of the stored values."""
    height, width = config.output_size_px
    if config.representation == "dense":
        return height, width
    if config.representation == "half":
        return -(-height // 2), -(-width // 2)
    if upsampler.last_step() is None:
        weights = "" if config.upsampler_weights is None else f" --upsampler-weights {config.upsampler_weights}"
        raise JobError(
            f"--represent compact: readers cannot take the last step of --upsampler {config.upsampler}{weights}: use "
            "bilinear, jbu without weights or multiview, or --represent dense"
        )
    return upsampler.grid_before_last_step(backbone.grid)


def compact_attribute(config: UpsampleConfig, upsampler: Upsampler) -> dict[str, Any] | None:
    """The attribute ``compact`` of the store: how readers make features of its values; None for a dense store."""
    step = upsampler.last_step() if config.representation == "compact" else {"name": "bilinear"}
    if config.representation == "dense" or step is None:
        return None
    compact: dict[str, Any] = {"size": list(config.output_size_px), "last_step": dict(step)}
    return compact if step["name"] == "bilinear" else {**compact, "guidance": list(config.size_px)}
