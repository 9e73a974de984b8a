"""Build the stages of one training process from the plan."""

import logging
import math
import socket
from dataclasses import dataclass

import torch

from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.provenance import backbone_name
from pipeline.images.batches import BatchLoader
from pipeline.images.sample import usable_images
from pipeline.reporting.seconds import StageSeconds
from pipeline.train.checkpoints import has_checkpoints
from pipeline.train.data import first_usable
from pipeline.train.held_out import HeldOutViews
from pipeline.train.objectives.base import FeatureSample, Objective
from pipeline.train.objectives.feature_cache import FeatureCache
from pipeline.train.objectives.jbu_solutions import JBUSolutionsObjective
from pipeline.train.objectives.jbu_views import JBUViewsObjective
from pipeline.train.objectives.lift import AT_SIZE, LiFTObjective, lift_scales
from pipeline.train.objectives.lift_initial import PLACES_PER_CHANNEL
from pipeline.train.objectives.solutions import Solutions
from pipeline.train.plan import TrainPlan, backbone_at, build_backbones
from pipeline.train.world import World
from schemas.train_options import TrainConfig

__all__ = ["TrainStages", "build_stages"]

logger = logging.getLogger(__name__)

_SAMPLE_IMAGES = 32


@dataclass(frozen=True, eq=False)
class TrainStages:
    """The stages of one training process.

    Attributes:
        objective: the objective, on the device.
        loader: loader of training batches.
        backbones: backbones to train on, at --size, on the device.
        measured: ``backbones``, plus the held-out one if any.
        views: held-out views for measurements.
    """

    objective: Objective
    loader: BatchLoader
    backbones: list[Backbone]
    measured: list[Backbone]
    views: HeldOutViews


def build_stages(plan: TrainPlan, world: World, threads: int, built: list[Backbone] | None = None) -> TrainStages:
    """Build all stages, identically in every process.

    Args:
        plan: plan of the training.
        world: this process; its device is used.
        threads: number of threads for decoding.
        built: the backbones to train on, at --size, if already built.

    Raises:
        JobError: a backbone differs from the plan's (other weights on this machine), or too few images are usable.
    """
    config = plan.config
    by_scale = [
        [scaled.to(world.device) for scaled in build_backbones(plan, choice, None if built is None else built[turn])]
        for turn, choice in enumerate(config.backbone_choices)
    ]
    backbones = [scales[AT_SIZE if len(scales) > 1 else 0] for scales in by_scale]
    measured = list(backbones)
    if config.held_out_choice is not None:
        measured.append(backbone_at(config, config.held_out_choice).to(world.device))
    expected = [*plan.identities, *([plan.held_out] if plan.held_out else [])]
    for backbone, identity in zip(measured, expected, strict=True):
        _check_identity(backbone, identity)
    _, held_out = first_usable(
        plan.val.references, plan.val.loader(config, 8, threads), config.val_count, tell=world.leads
    )
    samples = _samples(plan, world, threads, backbones)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        objective = _objective(plan, world, by_scale, samples)
    return TrainStages(
        objective.to(world.device),
        plan.train.loader(config, config.batch_images, threads, lift_scales(1)[0] if config.upsampler == "lift" else 1),
        backbones,
        measured,
        HeldOutViews(held_out, views=config.val_views, max_pad_px=config.max_pad_px, max_zoom=config.max_zoom),
    )


def _objective(
    plan: TrainPlan, world: World, by_scale: list[list[Backbone]], samples: list[FeatureSample]
) -> Objective:
    config = plan.config
    if config.upsampler == "lift":
        values = sum(backbone.num_chs * math.prod(backbone.grid) for backbone in by_scale[0])
        return LiFTObjective(config, by_scale[0], samples[0], *_caches(plan, world, [values], "features of"))
    backbones = [backbone for (backbone,) in by_scale]
    if config.target == "multiview":
        solutions = [Solutions(*both) for both in zip(backbones, samples, strict=True)]
        caches = _caches(plan, world, [own.values for own in solutions], "solutions for")
        sample = None if has_checkpoints(Objects(config.output)) else samples[0].images
        return JBUSolutionsObjective(config, solutions, caches, sample)
    return JBUViewsObjective(config, backbones, [sample.statistics for sample in samples])


def _caches(plan: TrainPlan, world: World, values: list[int], what: str) -> list[FeatureCache]:
    """Caches of so many values of each image, all of which keep theirs, or none; ``what`` they are, for the log."""
    max_bytes = 1e9 * plan.config.cache_gb / sum(values)
    caches = [FeatureCache(plan.train.references.num_rows, own, max_bytes * own) for own in values]
    if world.leads:
        logger.info(
            "%s all images take %.3g GB per worker: %s (--cache-gb %g)",
            what,
            sum(cache.bytes for cache in caches) / 1e9,
            "kept from the first epoch on" if caches[0].keeps else "recomputed in every epoch",
            plan.config.cache_gb,
        )
    return caches


def _samples(plan: TrainPlan, world: World, threads: int, backbones: list[Backbone]) -> list[FeatureSample]:
    """Sample each backbone's features, on the same training images.

    Raises:
        JobError: none of the sampled images is usable, or features are not finite.
    """
    count = min(_sample_images(plan.config, backbones), plan.train.references.num_rows)
    loader = plan.train.loader(plan.config, count, threads)
    images, error = usable_images(plan.train.references, count, lambda rows: loader.batches(rows, StageSeconds()))
    if len(images) == 0:
        raise JobError(f"--images {plan.config.images}: none of the sampled images is usable; the first error: {error}")
    images = images.to(world.device)
    return [FeatureSample(images.cpu(), _features_of(backbone, images)) for backbone in backbones]


def _sample_images(config: TrainConfig, backbones: list[Backbone]) -> int:
    """Number of images to sample; more if lift starts as interpolation of many channels on a coarse grid."""
    if config.upsampler != "lift" or config.lift_initial != "interpolation":
        return _SAMPLE_IMAGES
    (backbone,) = backbones
    return max(_SAMPLE_IMAGES, math.ceil(PLACES_PER_CHANNEL * backbone.num_chs / math.prod(backbone.grid)))


def _features_of(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    features = torch.cat([backbone(image[None]) for image in images]).cpu()
    # Checked here because later it would look like a problem of the images or the learning rate.
    if not features.isfinite().all():
        raise JobError(
            f"{backbone.label}: its features of the training images contain NaN or infinity: "
            "choose another layer, or check its weights"
        )
    return features


def _check_identity(backbone: Backbone, expected: dict[str, object]) -> None:
    identity = backbone.identity()
    if identity != expected:
        raise JobError(
            f"the backbone on {socket.gethostname()} is not the driver's: got {backbone_name(identity)}, expected "
            f"{backbone_name(expected)}; every node must load the same weights with the same version of timm"
        )
