"""Plan a training: collect and check everything before it starts."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from densefeat.storage.places import absolute_place, is_local
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.layers import choice_label
from pipeline.features.provenance import backbone_name
from pipeline.images.listing.findings import Finding, describe_findings
from pipeline.images.listing.source import Source, keys_digest, list_images
from pipeline.run.planning.places import check_apart
from pipeline.run.planning.sources import cluster_scan_map
from pipeline.train.data import ImageTable, key_hash
from pipeline.train.objectives.lift import lift_scales
from pipeline.train.output import CURVES, check_outputs_writable, stored_configuration
from schemas.configuration import differences
from schemas.train_options import OF_TARGET, BackboneChoice, TrainConfig

__all__ = ["TrainPlan", "backbone_at", "build_backbones", "make_train_plan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """A checked training; sent to workers.

    Attributes:
        config: the job's options.
        train: images to train on.
        val: candidates for measuring held-out views, in order of preference; more than needed, as some may be unusable.
        configuration: everything the weights depend on, JSON-serialisable.
        identities: identities of the backbones to train on, in order.
        held_out: identity of the backbone that is only measured on; None if there is none.
        begun: whether this resumes an existing training.
        findings: unused files in --images.
    """

    config: TrainConfig
    train: ImageTable
    val: ImageTable
    configuration: dict[str, Any]
    identities: list[dict[str, object]]
    held_out: dict[str, object] | None
    begun: bool
    findings: tuple[Finding, ...] = ()

    def describe(self) -> str:
        """Describe the plan in human-readable lines."""
        config, training, views = self.config, self.configuration["training"], self.configuration["views"]
        lines = [
            f"train       {config.upsampler}{self._details}",
            f"images      {self.train.references.num_rows:,} from {config.images}",
            *describe_findings(self.findings),
            f"held out    {config.val_count:,} of {self.val.references.num_rows:,} from "
            f"{config.val_images or config.images}, {config.val_views} views each",
            *(f"backbone    {backbone_name(identity)}" for identity in self.identities),
            *([f"measured on {backbone_name(self.held_out)}, not trained on"] if self.held_out else []),
            f"steps       {config.steps:,} of {config.batch_images} images on {config.workers} "
            f"worker{'s' if config.workers > 1 else ''}",
            f"output      {config.output}" + (" (resumed)" if self.begun else ""),
            "training    " + ", ".join(f"{name} {value}" for name, value in {**training, **views}.items()),
        ]
        return "\n".join(lines)

    @property
    def _details(self) -> str:
        config = self.config
        if config.upsampler == "lift":
            return ""
        if config.target == "multiview":
            return ", to copy the solutions of multiview"
        return f", {'with' if config.final else 'without'} the final convolution"


def make_train_plan(config: TrainConfig) -> tuple[TrainPlan, list[Backbone]]:
    """Inspect images, backbones and output, and check that they are consistent.

    Returns:
        The plan, and the backbones to train on (at --size) that were built for it.

    Raises:
        JobError: they are not; the message says why and what to do.
    """
    for images in filter(None, (config.images, config.val_images)):
        check_apart(images, "--output", config.output, [CURVES])
    stored = stored_configuration(config)
    source = list_images(
        config.images, limit=config.limit, image_column=config.image_column, scan_map=cluster_scan_map()
    )
    backbones = [backbone_at(config, choice) for choice in config.backbone_choices]
    unseen = [] if config.held_out_choice is None else [backbone_at(config, config.held_out_choice)]
    held_out = unseen[0].identity() if unseen else None
    identities = [backbone.identity() for backbone in backbones]
    _check_labels(config, identities, held_out)
    _check_grids(config, [*backbones, *unseen])
    train, val = _split(config, source)
    plan = TrainPlan(
        config=config,
        train=train,
        val=val,
        configuration=_configuration(config, train, val, identities, held_out),
        identities=identities,
        held_out=held_out,
        begun=stored is not None,
        findings=source.findings,
    )
    if stored is not None and (different := differences(stored, plan.configuration)):
        raise JobError(
            f"--resume: {config.output} was started with a different configuration:\n  "
            + "\n  ".join(different)
            + "\nUse the original options, or choose another --output"
        )
    if not config.dry_run:
        check_outputs_writable(config)
    return plan, backbones


def build_backbones(plan: TrainPlan, choice: BackboneChoice, built: Backbone | None = None) -> list[Backbone]:
    """Build a backbone on the CPU at every size that training needs: --size only, or for lift all `lift_scales`.

    Args:
        plan: plan of the training.
        choice: which backbone.
        built: the backbone at --size, if already built.
    """
    scales = lift_scales(plan.config.lift_octaves) if plan.config.upsampler == "lift" else (1.0,)
    return [built if built is not None and scale == 1 else backbone_at(plan.config, choice, scale) for scale in scales]


def backbone_at(config: TrainConfig, choice: BackboneChoice, scale: float = 1) -> Backbone:
    """Build a backbone on the CPU for images of ``scale`` times --size."""
    height, width = (round(scale * side) for side in config.size_px)
    return build_backbone(choice.name, size=(height, width), weights=choice.weights, layer=choice.layers)


def _check_labels(config: TrainConfig, identities: list[dict[str, Any]], held_out: dict[str, Any] | None) -> None:
    """Check that name and layer are unique: tables and metadata identify backbones by them."""
    named = [(f"--backbones {text}", identity) for text, identity in zip(config.backbones, identities, strict=True)]
    if held_out is not None:
        named.append((f"--held-out-backbone {config.held_out_backbone}", held_out))
    seen: dict[str, str] = {}
    for option, identity in named:
        label = choice_label(identity["name"], identity["layer"])
        if label in seen:
            raise JobError(
                f"{option} and {seen[label]} are both {label}, and would be indistinguishable "
                "in the results: omit one, or choose another layer"
            )
        seen[label] = option


def _check_grids(config: TrainConfig, backbones: list[Backbone]) -> None:
    """Check the grids: at least 2×2, and for lift evenly divisible, with an even number of channels."""
    for backbone in backbones:
        if min(backbone.grid) < 2:
            raise JobError(
                f"{backbone.label} has a grid of {backbone.grid[0]}×{backbone.grid[1]} at "
                f"--size {config.size}: expected at least 2×2. Choose a larger --size or an earlier layer"
            )
        if config.upsampler == "lift" and backbone.num_chs % 2:
            raise JobError(
                f"{backbone.label} has {backbone.num_chs} channels: lift halves them, so "
                "their number must be even. Choose another layer"
            )
        step = 2 ** (config.lift_octaves - 1) * backbone.reduction
        if config.upsampler == "lift" and any(side % step for side in config.size_px):
            raise JobError(
                f"--size {config.size}: lift trains on {backbone.label}, with a stride of "
                f"{backbone.reduction} px, at {config.lift_octaves} octaves: expected multiples of {step}"
            )


def _split(config: TrainConfig, source: Source) -> tuple[ImageTable, ImageTable]:
    """Split into images to train on, and images to measure on in the order of their hashes."""
    if config.val_images is None:
        hashes = _hashes(source.references)
        of_train = pa.array([number >= config.held_out_share for number in hashes])
        train = ImageTable(source.references.filter(of_train), source.kind, source.image_column)
        val = ImageTable(source.references, source.kind, source.image_column)
        candidates = [row for row in _order(hashes) if hashes[row] < config.held_out_share]
    else:
        other = list_images(config.val_images, image_column=config.image_column, scan_map=cluster_scan_map())
        for line in describe_findings(other.findings):
            logger.info("--val-images: %s", line)
        train = ImageTable(source.references, source.kind, source.image_column)
        val = ImageTable(other.references, other.kind, other.image_column)
        candidates = _order([key_hash(key) for key in other.references["key"].to_pylist()])
        if shared := _shared(train.references, val.references):
            raise JobError(
                f"--val-images {config.val_images}: {len(shared)} of them are also in --images (for example "
                f"{shared[0]}): images for measurements must not be trained on"
            )
    if len(candidates) < config.val_count:
        raise JobError(
            f"held-out views: got {len(candidates)} images, expected --val-count {config.val_count}. Give more "
            "(--val-images, --val-share), or a lower --val-count"
        )
    if train.references.num_rows == 0:
        raise JobError(
            f"--images {config.images}: no image is left to train on with --val-share {config.held_out_share}"
        )
    return train, val._replace(references=val.references.take(candidates))


def _hashes(references: pa.Table) -> list[float]:
    """`key_hash` of each row, 0 … 1; rows of one image, such as those of a list that names it twice, have one."""
    places, keys = _places(references), references["key"].to_pylist()
    first: dict[tuple[str, int | None], str] = {}
    for place, key in zip(places, keys, strict=True):
        first[place] = min(key, first.get(place, key))
    return [key_hash(first[place]) for place in places]


def _places(references: pa.Table) -> list[tuple[str, int | None]]:
    """Where each image is: its URI, of a local file without links, and its offset in tars and Parquet."""
    uris = [os.path.realpath(uri) if is_local(uri) else uri for uri in references["uri"].to_pylist()]
    return list(zip(uris, references["offset"].to_pylist(), strict=True))


def _order(hashes: list[float]) -> list[int]:
    return sorted(range(len(hashes)), key=hashes.__getitem__)


def _shared(train: pa.Table, val: pa.Table) -> list[str]:
    """URIs of images in both tables."""
    return sorted(uri for uri, _ in {*_places(train)} & {*_places(val)})


def _configuration(
    config: TrainConfig,
    train: ImageTable,
    val: ImageTable,
    identities: list[dict[str, Any]],
    held_out: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that weights and measurements depend on, except the number of steps."""
    names = ["batch_images", "effective_learning_rate", "seed", "workers"]
    if config.upsampler == "jbu":
        names.append("projection_chs")
        names += OF_TARGET["views"] if config.target == "views" else ["target"]
    else:
        names += ["lift_initial", "lift_loss", "lift_octaves", "lift_consistency"]
    backbones = {choice_label(identity["name"], identity["layer"]): identity for identity in identities}
    return {
        "upsampler": config.upsampler,
        "backbones": backbones,
        "turns": list(backbones),  # their order, which `differences` ignores in a mapping
        "images": _described(config.images, train),
        "geometry": {
            "size": list(config.size_px),
            "fit": config.fit,
            "max_pixels": config.max_pixels,
            "min_side": config.min_side,
        },
        "training": {name.removeprefix("effective_"): getattr(config, name) for name in names},
        "views": {"max_pad_px": config.max_pad_px, "max_zoom": config.max_zoom},
        "held_out": {
            "images": _described(config.val_images or config.images, val),
            "count": config.val_count,
            "views": config.val_views,
            "backbone": held_out,
        },
    }


def _described(images: str, table: ImageTable) -> dict[str, Any]:
    known = {"rows": table.references.num_rows, "keys_sha256": keys_digest(table.references)}
    return {"images": absolute_place(images), "image_column": table.image_column, **known}
