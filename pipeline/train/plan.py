"""What a training is going to do, found out and checked before it does anything."""

import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from densefeat.errors import StorageUnavailable
from densefeat.storage.objects import Objects
from densefeat.storage.places import absolute_place
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.provenance import backbone_name
from pipeline.images.listing.findings import Finding, describe_findings
from pipeline.images.listing.source import Source, keys_digest, list_images
from pipeline.io.outputs import check_output_file
from pipeline.io.storage import check_writable, storage_explained
from pipeline.reporting.software import software_versions
from pipeline.run.places import check_apart
from pipeline.run.plan import cluster_scan_map
from pipeline.train.checkpoints import has_checkpoints
from pipeline.train.data import ImageTable, key_hash
from pipeline.train.objectives.lift import lift_scales
from schemas.configuration import differences
from schemas.train_options import BackboneChoice, TrainConfig

__all__ = ["TrainPlan", "backbone_at", "build_backbones", "claimed_output", "make_train_plan"]

logger = logging.getLogger(__name__)

# The object in --output that claims it: the configuration, which a resume is compared with.
_CLAIM = "training.json"


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """A checked training; crosses into workers.

    Attributes:
        config: what was asked.
        train: images to train on.
        val: images to measure held-out views on, best first: more than are needed, as some may turn out unusable.
        configuration: what the weights will depend on, JSON-able.
        identities: of the backbones trained on, in order.
        held_out: identity of the one that is only measured on.
        begun: whether this training was begun before, and is to go on.
        findings: what of --images is not used.
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
        """The plan for a person."""
        config, training, views = self.config, self.configuration["training"], self.configuration["views"]
        lines = [
            f"train       {config.upsampler}"
            + (
                "" if config.upsampler == "lift" else f", {'with' if config.final else 'without'} the final convolution"
            ),
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


def make_train_plan(config: TrainConfig) -> tuple[TrainPlan, list[Backbone]]:
    """Look at images, backbones and output, and check that they fit together.

    Returns:
        The plan, and the backbones trained on (at --size) that were built for it.

    Raises:
        JobError: they do not; the message says why and what to do.
    """
    for images in filter(None, (config.images, config.val_images)):
        check_apart(images, "--output", config.output)
    stored = _stored_configuration(config)
    backbones = [backbone_at(config, choice) for choice in config.backbone_choices]
    held_out = None if config.held_out_choice is None else backbone_at(config, config.held_out_choice).identity()
    identities = [backbone.identity() for backbone in backbones]
    _check_labels(config, identities, held_out)
    _check_grids(config, backbones)
    source = list_images(
        config.images, limit=config.limit, image_column=config.image_column, scan_map=cluster_scan_map()
    )
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
        _check_writable(config)
    return plan, backbones


@contextmanager
def claimed_output(plan: TrainPlan) -> Iterator[None]:
    """Write the configuration to --output, unless it is there already, for the training in the block.

    If that ends without a checkpoint, the claim is taken back, with the folder if it was made for it: other options can
    then be tried there.

    Raises:
        JobError: another training has been begun there in the meantime.
    """
    if plan.begun:
        yield
        return
    objects = Objects(plan.config.output)
    with objects.leaving_no_folders():
        _claim(plan, objects)
        try:
            yield
        finally:
            with suppress(OSError, StorageUnavailable):  # of a storage that another error may be of
                if not has_checkpoints(objects):
                    objects.delete(_CLAIM)


def _claim(plan: TrainPlan, objects: Objects) -> None:
    claim = {"configuration": plan.configuration, "versions": software_versions(), "claimed_by": uuid.uuid4().hex}
    with storage_explained(f"--output {plan.config.output}"):
        try:
            objects.create(_CLAIM, json.dumps(claim, indent=2).encode())
        except FileExistsError:
            raise JobError(f"another training has begun in {plan.config.output}: choose another --output") from None


def build_backbones(plan: TrainPlan, choice: BackboneChoice, built: Backbone | None = None) -> list[Backbone]:
    """A backbone at every size that training needs it at, on the CPU: at --size only, or for lift at `lift_scales`.

    Args:
        plan: of the training.
        choice: which.
        built: the one at --size, if it is there already.
    """
    scales = lift_scales(plan.config.lift_octaves) if plan.config.upsampler == "lift" else (1.0,)
    return [built if built is not None and scale == 1 else backbone_at(plan.config, choice, scale) for scale in scales]


def backbone_at(config: TrainConfig, choice: BackboneChoice, scale: float = 1) -> Backbone:
    """A backbone for images of ``scale`` times --size, on the CPU."""
    height, width = (round(scale * side) for side in config.size_px)
    return build_backbone(choice.name, size=(height, width), weights=choice.weights, layer=choice.layer)


def _stored_configuration(config: TrainConfig) -> dict[str, Any] | None:
    with storage_explained(f"--output {config.output}"):
        objects = Objects(config.output)
        try:
            stored: dict[str, Any] = json.loads(objects.get(_CLAIM))["configuration"]
        except FileNotFoundError:
            if has_checkpoints(objects):
                raise JobError(
                    f"--output {config.output} has checkpoints, but no {_CLAIM}, which says of what training: choose "
                    "another, or delete them"
                ) from None
            return None
        except (ValueError, LookupError, TypeError) as error:
            raise JobError(
                f"--output {config.output}: its {_CLAIM} is damaged ({error}), which says what the checkpoints are of: "
                "begin anew with another"
            ) from error
    if not config.resume:
        raise JobError(
            f"--output {config.output} already holds a training: pass --resume to continue it, or choose another"
        )
    return stored


def _check_writable(config: TrainConfig) -> None:
    """The last check, because it writes: whatever gets a result, before hours are spent on it."""
    check_writable(Objects(config.output), f"--output {config.output}")
    if config.featup_checkpoint is not None:
        check_output_file("--featup-checkpoint", config.featup_checkpoint)


def _check_labels(config: TrainConfig, identities: list[dict[str, object]], held_out: dict[str, object] | None) -> None:
    """Tables and metadata call a backbone by its name and layer: no two may have the same."""
    asked = [(f"--backbones {text}", one) for text, one in zip(config.backbones, identities, strict=True)]
    if held_out is not None:
        asked.append((f"--held-out-backbone {config.held_out_backbone}", held_out))
    seen: dict[tuple[object, object], str] = {}
    for option, identity in asked:
        label = identity["name"], identity["layer"]
        if label in seen:
            raise JobError(
                f"{option} and {seen[label]} are both {label[0]} at layer {label[1]}, and could not be told apart in "
                "the results: leave one out, or choose another layer"
            )
        seen[label] = option


def _check_grids(config: TrainConfig, backbones: list[Backbone]) -> None:
    """Lift needs grids that halve evenly; every upsampler needs something to upsample."""
    for backbone in backbones:
        if min(backbone.grid) < 2:
            raise JobError(
                f"{backbone.name} at layer {backbone.layer} has a grid of {backbone.grid[0]}×{backbone.grid[1]} at "
                f"--size {config.size}: expected at least 2×2. Choose a larger --size or an earlier layer"
            )
        if config.upsampler == "lift" and backbone.num_chs % 2:
            raise JobError(
                f"{backbone.name} has {backbone.num_chs} channels at layer {backbone.layer}: lift halves them, need "
                "an even number. Choose another layer"
            )
        step = 2 ** (config.lift_octaves - 1) * backbone.reduction
        if config.upsampler == "lift" and any(side % step for side in config.size_px):
            raise JobError(
                f"--size {config.size}: lift trains on {backbone.name}, layer {backbone.layer}, with a stride of "
                f"{backbone.reduction} px, at {config.lift_octaves} octaves: expected multiples of {step}"
            )


def _split(config: TrainConfig, source: Source) -> tuple[ImageTable, ImageTable]:
    """Images to train on, and those to measure on in the order of their hashes."""
    hashes = [key_hash(key) for key in source.references["key"].to_pylist()]
    if config.val_images is None:
        of_train = pa.array([number >= config.val_share for number in hashes])
        train = ImageTable(source.references.filter(of_train), source.kind, source.image_column)
        val = ImageTable(source.references, source.kind, source.image_column)
        candidates = [row for row in _by(hashes) if hashes[row] < config.val_share]
    else:
        other = list_images(config.val_images, image_column=config.image_column, scan_map=cluster_scan_map())
        for line in describe_findings(other.findings):
            logger.info("--val-images: %s", line)
        train = ImageTable(source.references, source.kind, source.image_column)
        val = ImageTable(other.references, other.kind, other.image_column)
        candidates = _by([key_hash(key) for key in other.references["key"].to_pylist()])
        if shared := _shared(train.references, val.references):
            raise JobError(
                f"--val-images {config.val_images}: {len(shared)} of them are among --images too (one is "
                f"{shared[0]}): what is measured on must not be trained on"
            )
    if len(candidates) < config.val_count:
        raise JobError(
            f"held-out views: got {len(candidates)} images, expected --val-count {config.val_count}. Give more "
            "(--val-images, --val-share), or a lower --val-count"
        )
    if train.references.num_rows == 0:
        raise JobError(f"--images {config.images}: no image is left to train on with --val-share {config.val_share}")
    return train, val._replace(references=val.references.take(candidates))


def _by(hashes: list[float]) -> list[int]:
    return sorted(range(len(hashes)), key=hashes.__getitem__)


def _shared(train: pa.Table, val: pa.Table) -> list[str]:
    """URIs (and offsets, in tars and Parquet) that both tables have."""
    places = [set(zip(table["uri"].to_pylist(), table["offset"].to_pylist(), strict=True)) for table in (train, val)]
    return sorted(uri for uri, _ in places[0] & places[1])


def _configuration(
    config: TrainConfig,
    train: ImageTable,
    val: ImageTable,
    identities: list[dict[str, object]],
    held_out: dict[str, object] | None,
) -> dict[str, Any]:
    """What the weights and what is measured of them depend on, but for how long training goes on."""
    names = ["batch_images", "effective_learning_rate", "seed", "workers"]
    if config.upsampler == "jbu":
        names += ["jitters", "projection_chs", "crf_weight", "initial_sigma", "downsampler", "final"]
    else:
        names += ["lift_initial", "lift_loss", "lift_octaves", "lift_consistency"]
    backbones = {f"{one['name']}@{one['layer']}": one for one in identities}
    return {
        "upsampler": config.upsampler,
        "backbones": backbones,
        "turns": list(backbones),  # their order, which `differences` does not see in a mapping
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
