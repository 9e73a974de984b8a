"""Measure a plan on a few of its images, really computed: bytes and seconds that the job will take."""

import time
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from densefeat.layout import step_sha256
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.features.pca import Basis, fit
from pipeline.images.sample import next_wave
from pipeline.reporting.units import readable_duration, readable_size
from pipeline.run.feature_worker import FeatureWorker
from pipeline.run.planning.plan import Plan
from pipeline.run.preparation.gather import gather
from pipeline.run.preparation.prepare import CALIBRATION_IMAGES
from pipeline.run.recipe import UpsampleRecipe
from pipeline.run.shard_worker import ShardWorker, StoreEncoding, make_worker
from pipeline.run.workers import InlineWorkers, TaskFailed
from pipeline.store.calibration import Calibration, choose_steps
from pipeline.store.layout import claim
from pipeline.store.shard import finished_shards
from pipeline.upsamplers.fitting import UpsamplerFit
from schemas.attributes import StoreAttributes

__all__ = ["Measurement", "measure"]

_SLOW_S = 30.0  # longer than kernels take to compile: upsampling that fits each image is measured on one only
_PCA_IMAGES = 16
_SHARE_IMAGES = 256  # few images vary in few directions: a share of the variance takes more components in many
_FIT_PER_VIEWS = 1.5  # time of a fit, as a multiple of that for the backbone's features of its views
_ROUNDS = 3  # batches per task that runs at the same time: the first round also fills the pipeline


@dataclass(frozen=True)
class Measurement:
    """Cost of a job, estimated from a few images.

    Attributes:
        images: number of images computed, all stages.
        device: name of the device that computed them.
        components: k of a basis fitted on a few images, or of the basis given.
        more_components: whether the job may need more, to explain a share of the variance in more images.
        image_nbytes: compressed size of an image.
        image_seconds: wall time of an image, with one worker in this process that computes as many at once as it can.
        preparing_seconds: estimated time for the basis and the quantization steps.
        images_to_do: images that the job would compute.
        images_stored: images in the store when it is finished.
    """

    images: int
    device: str
    components: int
    more_components: bool
    image_nbytes: float
    image_seconds: float
    preparing_seconds: float
    images_to_do: int
    images_stored: int

    def describe(self, *, on_ray: bool) -> str:
        """The measurement as text for the user; ``on_ray``: whether the job's workers are elsewhere."""
        at_least = "at least " if self.more_components else ""
        about = at_least or "about "
        lines = [
            f"measured    {self.images} images on {self.device}, {at_least}{self.components} components: "
            f"{readable_size(self.image_nbytes)} and {self.image_seconds:.3g} s an image",
            f"bytes       {about}{readable_size(self.image_nbytes * self.images_stored)} when the store is finished",
        ]
        if not self.images_to_do:
            return "\n".join([*lines, "time        none: the shards of this job are done"])
        seconds = self.image_seconds * self.images_to_do + self.preparing_seconds
        worker = "with one worker like this process (N take about 1/N)" if on_ray else "in this process"
        line = f"time        {about}{readable_duration(seconds)} {worker} for {self.images_to_do:,} images"
        if self.preparing_seconds:
            line += f" (PCA and quantization steps: {readable_duration(self.preparing_seconds)})"
        return "\n".join([*lines, f"{line}; the start comes on top"])


def measure(plan: Plan) -> Measurement:
    """Compute some images of a plan in this process, and discard them.

    Raises:
        JobError: none of the images is usable, or a stage fails.
    """
    recipe = plan.spec.recipe
    assert isinstance(recipe, UpsampleRecipe)
    with InlineWorkers(plan.spec, attempts=1, make=partial(make_worker, stages=plan.stages)) as workers:
        worker = workers.worker
        assert isinstance(worker, ShardWorker)
        pca_images = min(plan.config.pca_images or len(plan.references), len(plan.references))
        by_share = plan.basis is None and isinstance(plan.components, float)
        fitted_on = min(_SHARE_IMAGES if by_share else _PCA_IMAGES, pca_images)
        basis, pca_s = _basis(plan, fitted_on, workers)
        fit, fit_s = _usual_fit(plan, basis, workers)
        calibration, slow, calibration_s = _calibration(plan, basis, fit, workers)
        if slow:
            images, image_s = 1, calibration_s / worker.computing_at_once
            nbytes = calibration.nbytes
        else:
            measured = choose_steps(recipe.dtype, calibration.mean_square, recipe.error_floor)
            step = measured if plan.like is None else plan.like.fitted.step
            images, image_s, nbytes = _shards(plan, workers, basis, fit, step)
        device = worker.made_by()["device"]
    to_do, prepared = _to_do(plan)
    calibrated = min(CALIBRATION_IMAGES, len(plan.references))
    preparing_s = 0.0 if prepared else pca_s * pca_images + fit_s + calibration_s * calibrated
    return Measurement(
        images=images,
        device=f"{device} ({plan.spec.threads} threads)" if device == "cpu" else device,
        components=len(basis.components),
        more_components=by_share and fitted_on < pca_images,
        image_nbytes=nbytes,
        image_seconds=image_s,
        preparing_seconds=preparing_s,
        images_to_do=to_do,
        images_stored=plan.features.rows,
    )


def _basis(plan: Plan, images: int, workers: InlineWorkers) -> tuple[Basis, float]:
    """The plan's basis, or one fitted on some images; and seconds of PCA an image."""
    if plan.basis is not None:
        return plan.basis, 0.0
    threads = workers.worker.computing_at_once
    images_in_task = max(1, min(images // threads, workers.worker.batch_size * 4))
    gathered = partial(gather, workers, FeatureWorker.moments, plan.references, images_in_task=images_in_task)
    gathered(1, what="PCA")  # the first pass of a network is slow
    begun = time.monotonic()
    sample = gathered(images, what="PCA")
    return fit(sample.sums, plan.components, at_most=True), (time.monotonic() - begun) / sample.images


def _usual_fit(plan: Plan, basis: Basis, workers: InlineWorkers) -> tuple[UpsamplerFit | None, float]:
    """A fit of the upsampler, if it needs one: the given one, or one without images; and seconds of the job's fit."""
    if plan.fitting is None or plan.like is not None:
        return (None if plan.like is None else plan.like.fitted.upsampler), 0.0
    usual = plan.fitting.usual(len(basis.components))
    images = min(plan.fitting.images, len(plan.references))
    sample = partial(gather, workers, ShardWorker.fitting_sample, plan.references, images_in_task=1, what="views")
    begun = time.monotonic()
    gathered = sample(workers.worker.computing_at_once + 1, basis)
    return usual, _FIT_PER_VIEWS * images * (time.monotonic() - begun) / gathered.images


def _calibration(
    plan: Plan, basis: Basis, fit: UpsamplerFit | None, workers: InlineWorkers
) -> tuple[Calibration, bool, float]:
    """Scale and bytes of an upsampled image, whether it is slow to compute, and the seconds that it takes."""
    gathered = partial(gather, workers, ShardWorker.calibrate, plan.references, images_in_task=1, what="calibration")
    begun = time.monotonic()
    sample = gathered(1, basis, fit)
    slow = time.monotonic() - begun > _SLOW_S
    if not slow:  # the first one may have compiled kernels
        begun = time.monotonic()
        sample = gathered(workers.worker.computing_at_once + 1, basis, fit)
    seconds = (time.monotonic() - begun) / sample.images
    return Calibration(sample.sums.mean_square / sample.images, sample.sums.nbytes / sample.images), slow, seconds


def _shards(
    plan: Plan,
    workers: InlineWorkers,
    basis: Basis,
    fit: UpsamplerFit | None,
    step: npt.NDArray[np.float32] | None,
) -> tuple[int, float, float]:
    """Images made, seconds of wall time and bytes an image: shards of one batch each, in a temporary folder."""
    worker = workers.worker
    count = worker.batch_size * (worker.computing_at_once + 1) * _ROUNDS
    references = plan.references.take(next_wave(len(plan.references), count, 0, 0))
    with TemporaryDirectory() as folder:
        objects = Objects(folder)
        configuration = plan.configuration.with_basis(basis.digest, len(basis.components))
        attributes = StoreAttributes(configuration, {}, step_sha256=step_sha256(step), compact=plan.compact)
        claim(objects, attributes, basis, step)
        encoding = StoreEncoding(basis, step, configuration.hash, fit)
        batches = [references.slice(first, worker.batch_size) for first in range(0, len(references), worker.batch_size)]
        tasks = [(objects, shard, batch, encoding) for shard, batch in enumerate(batches)]
        begun = time.monotonic()
        results = [result for _, result in workers.map(ShardWorker.make_shard, tasks)]
        seconds = time.monotonic() - begun
    records = [result for result in results if not isinstance(result, TaskFailed)]
    if failed := [result.reason for result in results if isinstance(result, TaskFailed)]:
        raise JobError(f"--measure: computing a few images failed: {failed[0]}")
    nbytes, ok = (sum(getattr(record, name) for record in records) for name in ("total_nbytes", "rows_ok"))
    if not ok:
        raise JobError(f"--measure: none of {len(references)} images is usable: check --images")
    return len(references), seconds / len(references), nbytes / ok


def _to_do(plan: Plan) -> tuple[int, bool]:
    """Images that the job has to make, and whether basis and steps are there already."""
    if plan.growth is not None:
        return plan.growth.rows_added, True
    resumed = plan.stored if plan.config.continues else None
    done = finished_shards(Objects(plan.config.store), resumed.hash).keys() if resumed else set()
    images = sum(len(plan.features.rows_of(shard)) for shard in plan.shards if shard not in done)
    return images, resumed is not None
