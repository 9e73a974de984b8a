"""Plan a job: resolve and check everything before the job does any work."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from densefeat.errors import StoreError
from densefeat.layout import INDEX, MANIFEST, FeatureLayout, ledger_key
from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.pca import Basis
from pipeline.images.decoding.decode import Geometry
from pipeline.images.listing.findings import Finding, describe_findings
from pipeline.io.storage import check_writable
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.planning.configuration import (
    compact_attribute,
    store_configuration,
    stored_size,
    with_stored_defaults,
)
from pipeline.run.planning.like import LikeStore, check_like, read_like, with_defaults_like
from pipeline.run.planning.places import check_apart, check_same, stored_attributes_at
from pipeline.run.planning.sources import images_of
from pipeline.run.planning.sources import listed as list_source
from pipeline.run.recipe import FeatureRecipe, ImageRecipe, Stages, UpsampleRecipe, backbone_fields
from pipeline.run.resources import available_cores, fits_this_process
from pipeline.store.appending.growth import Growth
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.fitting import Fitting
from pipeline.upsamplers.interface import Upsampler
from schemas.attributes import StoreAttributes
from schemas.configuration import (
    SourceConfiguration,
    SourceKind,
    StoreConfiguration,
    differences,
)
from schemas.options import DEFAULT_COMPONENTS, FeatureConfig, PcaConfig, UpsampleConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked job.

    Attributes:
        config: options of the job.
        references: the images, one per row (``schemas.index.REFERENCES``).
        class_names: class names of the labels.
        channels: of the backbone, before PCA.
        backbone_license: of its weights; None if unknown.
        features: shape and sharding of the feature array, with the most components if a share is to decide on them.
        configuration: everything that the features depend on, except for a basis that is not fitted yet.
        basis: basis from ``--pca`` or ``--like``; None: to be fitted.
        like: the store of ``--like``; None: steps are to be measured, and the upsampler to be fitted if it needs that.
        stored: attributes of the store that is to be continued or overwritten; None if there is no store.
        compact: attribute of that name of the store; None for a dense store.
        fitting: how the upsampler is fitted to the images; None if it needs no fit.
        spec: spec of the workers.
        stages: stages of the spec's recipe, built here for a worker in this process; None with workers elsewhere.
        findings: parts of the source that are not used; empty if the store is resumed, as its source is not listed.
        growth: rows that are to be appended before shards are made; None: there are none.
        waiting: number of new images that can be appended only when the store is finished.
    """

    config: UpsampleConfig
    references: pa.Table
    class_names: tuple[str, ...]
    channels: int
    backbone_license: str | None
    features: FeatureLayout
    configuration: StoreConfiguration
    basis: Basis | None
    stored: StoreAttributes | None
    compact: Mapping[str, Any] | None
    fitting: Fitting | None
    spec: WorkerSpec
    stages: Stages | None
    findings: tuple[Finding, ...]
    growth: Growth | None = None
    waiting: int = 0
    like: LikeStore | None = None

    @property
    def shards(self) -> range:
        """Shards that this job makes, unless they are done."""
        return self.config.shard_range(self.features.shards)

    @property
    def components(self) -> float:
        """Components of a basis that is to be fitted, as `pipeline.features.pca.fit` takes them."""
        pca = self.configuration.pca
        return self.features.components if pca.explained_share is None or pca.components else pca.explained_share

    def shard_references(self, shard: int) -> pa.Table:
        """References of a shard's images."""
        return self.rows_of_shard(shard, range(len(self.features.rows_of(shard))))

    def rows_of_shard(self, shard: int, rows: range) -> pa.Table:
        """References of some rows of a shard, by their positions in it."""
        first = self.features.rows_of(shard).start + rows.start
        # Copied, because Arrow pickles the whole table with a slice of it.
        return self.references.slice(first, len(rows)).take(pa.array(range(len(rows))))


def make_plan(config: UpsampleConfig, listed: Callable[[int], None] = lambda images: None) -> Plan:
    """Inspect source, store, backbone and upsampler, and check that they fit together.

    Args:
        config: options of the job.
        listed: called with the number of images as soon as it is known, unless the store is finished already.

    Raises:
        JobError: they do not fit; the message says why and what to do.
    """
    check_apart(config.images, "--store", config.store, [INDEX, MANIFEST, ledger_key(0)])
    stored = stored_attributes_at(config)
    resumed = stored if config.continues else None
    if resumed:
        config = with_stored_defaults(config, resumed.configuration)
    like = None if config.like is None else read_like(config.like)
    if like and not resumed:
        config = with_defaults_like(config, like)
    images = images_of(config, resumed)  # first: a mistyped path is said before downloads
    references, source = images.references, images.source
    if images.growth or not (resumed and Objects(config.store).exists(MANIFEST)):
        listed(images.growth.rows_added if images.growth else references.num_rows)
    backbone = _checked_backbone(config)
    upsampler = build_upsampler(config.upsampler, config.upsampler_weights, backbone, config.upsampler_options)
    _check_upsampler(upsampler, backbone, config)
    basis = _given_basis(config, like, backbone)
    k = _components(config, backbone, basis, resumed)
    features = _layout(config, references.num_rows, k, stored_size(config, upsampler, backbone))
    compact = compact_attribute(config, upsampler)
    recipe = _upsample_recipe(config, source, features, backbone, upsampler, guided="guidance" in (compact or {}))
    own = config.shard_range(features.shards)
    if not own:
        raise JobError(f"--shards {config.shards} selects none of the {features.shards} shards of this dataset")
    to_make = images.growth.rows_added if images.growth else len(own) * features.shard_rows
    inline = fits_this_process(config.worker_range, config.device, to_make)
    plan = Plan(
        config=config,
        references=references,
        class_names=images.class_names,
        channels=backbone.num_chs,
        backbone_license=backbone.license,
        features=features,
        configuration=store_configuration(
            config, source, recipe, basis, None if like is None else like.fitted, resumed=resumed is not None
        ),
        basis=None if basis is None else basis.truncated(k),
        stored=stored,
        compact=compact,
        fitting=upsampler.fitting(),
        spec=_spec(config, recipe),
        stages=Stages(backbone, upsampler) if inline else None,
        findings=images.findings,
        growth=images.growth,
        waiting=images.waiting,
        like=like,
    )
    if resumed:
        check_same(resumed, plan.configuration, config)
    if like:
        step_sha256 = like.attributes.step_sha256 if config.dtype == "int8" else None
        check_like(like, StoreAttributes(plan.configuration, {}, step_sha256=step_sha256, compact=plan.compact), config)
    if not config.dry_run:
        check_writable(Objects(config.store), f"--store {config.store}")  # last, because it writes
    return plan


def feature_spec(config: FeatureConfig) -> tuple[WorkerSpec, pa.Table, Stages]:
    """Worker spec, image references and stages of a job that needs only low-resolution features.

    Raises:
        JobError: as in ``make_plan``.
    """
    source = list_source(config)
    backbone = _checked_backbone(config)
    for line in describe_findings(source.findings):
        logger.info("%s", line)
    images = _image_recipe(config, source.kind, source.image_column)
    recipe = FeatureRecipe(images=images, **backbone_fields(config, backbone))
    return _spec(config, recipe), source.references, Stages(backbone)


def _image_recipe(config: FeatureConfig, kind: SourceKind, image_column: str | None) -> ImageRecipe:
    geometry = Geometry(config.size_px, config.fit, config.output_size_px)
    return ImageRecipe(kind, image_column, geometry, config.max_pixels, config.min_side)


def _upsample_recipe(
    config: UpsampleConfig,
    source: SourceConfiguration,
    features: FeatureLayout,
    backbone: Backbone,
    upsampler: Upsampler,
    *,
    guided: bool,
) -> UpsampleRecipe:
    return UpsampleRecipe(
        images=_image_recipe(config, source.kind, source.image_column),
        **backbone_fields(config, backbone),
        upsampler=config.upsampler,
        upsampler_weights=config.upsampler_weights,
        upsampler_options=config.upsampler_options,
        upsampler_identity=upsampler.identity(),
        components=features.components,
        dtype=config.dtype,
        error_floor=config.floor,
        shard_rows=features.shard_rows,
        represent=config.representation,
        guided=guided,
        embedding=backbone.embedding_channels if config.embedding else None,
        stored_size=(features.height, features.width),
    )


def _layout(config: UpsampleConfig, rows: int, k: int, size: tuple[int, int]) -> FeatureLayout:
    layout = FeatureLayout(rows, k, *size, config.dtype, shard_rows=1)
    return replace(layout, shard_rows=config.shard_rows(layout.image_nbytes))


def _spec(config: FeatureConfig, recipe: FeatureRecipe) -> WorkerSpec:
    return WorkerSpec(recipe, config.device, config.batch_size, available_cores(), config.decode_elsewhere)


def read_basis(uri: str, backbone: Backbone) -> Basis:
    """Read a basis from ``jobs/fit_pca.py`` (.npz) or from another store, and check that it is for the backbone.

    Raises:
        JobError: the basis cannot be read, or was fitted to other features.
        StorageUnavailable: the storage does not answer.
    """
    if uri.endswith(".npz"):
        try:
            folder, name = split_place(uri)
            basis, provenance = Basis.from_npz(Objects(folder).get(name))
        except (OSError, ValueError) as error:
            raise JobError(f"--pca {uri} cannot be read: {error}; make one with jobs/fit_pca.py") from error
    else:
        try:
            store = FeatureStore(uri)
            basis, provenance = Basis.of_store(store), store.attributes["configuration"]
        except StoreError as error:
            raise JobError(f"--pca {uri} cannot be read: {error}") from error
    other, own = provenance["backbone"], backbone.identity()
    if other != own:
        raise JobError(
            f"--pca {uri} was fitted to other features: "
            + "; ".join(differences(other, own))
            + ". Fit a basis for this backbone, or omit --pca"
        )
    return basis


def _given_basis(config: UpsampleConfig, like: LikeStore | None, backbone: Backbone) -> Basis | None:
    if like is None:
        return None if config.pca is None else read_basis(config.pca, backbone)
    k = config.components
    if isinstance(k, int) and k > len(like.fitted.basis.components):
        raise JobError(
            f"--components {k}, but the store --like {config.like} has {len(like.fitted.basis.components)}: omit it"
        )
    return like.fitted.basis


def _checked_backbone(config: FeatureConfig) -> Backbone:
    backbone = build_backbone(
        config.backbone,
        size=config.size_px,
        weights=config.weights,
        layer=config.layers,
        space=config.space,
        facet=config.facet,
    )
    asked = config.components if isinstance(config, PcaConfig) else None
    if isinstance(asked, int) and asked > backbone.num_chs:
        raise JobError(
            f"--components {asked}, but {backbone.label} has {backbone.num_chs} channels: ask for at most that many"
        )
    return backbone


def _check_upsampler(upsampler: Upsampler, backbone: Backbone, config: UpsampleConfig) -> None:
    try:
        upsampler.check_grid(backbone.num_chs, backbone.grid)
    except ValueError as error:
        raise JobError(
            f"--upsampler {config.upsampler} does not accept the {backbone.grid[0]}×{backbone.grid[1]} features of "
            f"{backbone.label}: {error}. Choose a larger --size or an earlier --layer"
        ) from error


def _components(
    config: UpsampleConfig, backbone: Backbone, basis: Basis | None, resumed: StoreAttributes | None
) -> int:
    """k; for a share of the variance and a basis that is to be fitted, the most that it can be."""
    if isinstance(config.components, float):
        if basis is not None:
            return basis.explaining(config.components)
        stored = resumed.configuration.pca.components if resumed else None
        return stored or backbone.num_chs
    if config.components is not None:
        return config.components
    return min(DEFAULT_COMPONENTS, backbone.num_chs if basis is None else len(basis.components))
