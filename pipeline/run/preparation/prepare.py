"""Prepare the store of a plan for shards: fit basis and upsampler, choose the quantization steps, set up the store."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from densefeat.layout import FEATURES, FeatureLayout, step_sha256
from densefeat.storage.objects import Objects
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.features.pca import Basis, fit
from pipeline.io.storage import storage_explained
from pipeline.reporting.software import software_versions
from pipeline.reporting.units import readable_size
from pipeline.run.feature_worker import FeatureWorker
from pipeline.run.planning.plan import Plan
from pipeline.run.preparation.fit_upsampler import fit_upsampler
from pipeline.run.preparation.gather import gather
from pipeline.run.shard_worker import ShardWorker, StoreEncoding
from pipeline.run.workers import Workers
from pipeline.store.calibration import choose_steps
from pipeline.store.fitted import stored_fitted
from pipeline.store.layout import claim, complete_setup, delete_store, existing_store, stored_attributes
from pipeline.store.space import check_space
from pipeline.upsamplers.fitting import UpsamplerFit
from schemas.attributes import StoreAttributes
from schemas.configuration import incompatibilities
from schemas.index import pending_index

logger = logging.getLogger(__name__)

_IMAGES_IN_TASK = 32  # images of the PCA sample in one task
CALIBRATION_IMAGES = 32  # images whose upsampled features set the quantization steps
_IMAGES_IN_CALIBRATION_TASK = 4  # few, because an upsampler that fits each image takes minutes per image


def prepare(plan: Plan, objects: Objects, workers: Workers, check: Callable[[], None] = lambda: None) -> StoreEncoding:
    """Make the store ready for shards, if it is not ready yet.

    ``check`` is called before the store is changed, and raises if the job is to end.

    Raises:
        JobError: the sample cannot be used, the store does not fit on the disk, the stored arrays are damaged, or
            another job set up or deleted the store in the meantime.
    """
    with storage_explained(objects.uri):
        if plan.config.continues and (joined := _join(plan, objects)):
            return joined
    basis = plan.basis or fit_basis(plan.references, plan.components, plan.config.pca_images, workers)
    explained = float(basis.explained_variance_ratio.sum())
    logger.info("PCA: %d components explain %.1f%% of the variance", len(basis.components), 100 * explained)
    fit = _fit(plan, basis, workers)
    step, image_nbytes = _calibrate(plan, basis, fit, workers)
    _check_space(plan, objects, image_nbytes)
    configuration = plan.configuration.with_basis(basis.digest, len(basis.components))
    attributes = StoreAttributes(
        configuration=configuration if fit is None else configuration.with_fit(fit.identity()),
        versions=software_versions(),
        class_names=plan.class_names,
        explained_variance=explained,
        step_sha256=step_sha256(step),
        compact=plan.compact,
        backbone_license=plan.backbone_license,
    )
    check()
    with storage_explained(objects.uri):
        if plan.config.overwrite:
            _delete_planned(plan, objects)
        try:
            claim(objects, attributes, basis, step, {} if fit is None else fit.arrays)
        except FileExistsError:
            if not plan.config.continues:
                raise JobError(
                    f"another job set up {objects.uri} in the meantime: use --resume to continue it"
                ) from None
        encoding = _join(plan, objects)
    if encoding is None:
        raise JobError(f"another job deleted {objects.uri} while this one set it up: stop one of them")
    return encoding


def _join(plan: Plan, objects: Objects) -> StoreEncoding | None:
    """Use the existing store, whichever job set it up, and complete its setup if necessary; None if there is no store.

    Raises:
        JobError: the store was made with other options, or is damaged, or was replaced in the meantime.
    """
    stored = existing_store(objects)
    if stored is None:
        return None
    if different := incompatibilities(stored.configuration, plan.configuration):
        raise JobError(f"another job set up {objects.uri} in the meantime, with other options: {'; '.join(different)}")
    try:
        features = replace(plan.features, components=stored.configuration.pca.components or 0)
        complete_setup(objects, features, pending_index(plan.references))
    except FileExistsError as error:
        raise JobError(f"{error} while this job set it up: stop one of the two jobs") from error
    return _stored_encoding(features, objects)


def _delete_planned(plan: Plan, objects: Objects) -> None:
    """Delete the store that existed when the job was planned.

    Raises:
        JobError: another job has set up a different store.
    """
    stored = existing_store(objects)
    if stored is not None and stored != plan.stored:
        raise JobError(
            f"another job set up {objects.uri} in the meantime: this is not the store that --overwrite was to delete"
        )
    if stored is not None and stored.retired is not None:
        logger.warning(
            "%s: %s of its rows were retired, and are in use again in the new store: retire them there",
            objects.uri, f"{stored.retired.rows:,}",
        )  # fmt: skip
    delete_store(objects)


def fit_basis(references: pa.Table, components: float, images: int, workers: Workers) -> Basis:
    """Fit components on a sample of ``images`` (0: all) usable images, distributed over the workers.

    Args:
        references: the images.
        components: as in `pipeline.features.pca.fit`.
        images: size of the sample.
        workers: the workers.

    Raises:
        JobError: too few images are usable.
    """
    share = f"components for {100 * components:g}% of the variance"
    wanted = share if isinstance(components, float) else f"{components} components"
    logger.info("PCA: fitting %s on %d images", wanted, min(images, references.num_rows) or references.num_rows)
    sample = gather(workers, FeatureWorker.moments, references, images, images_in_task=_IMAGES_IN_TASK, what="PCA")
    return fit(sample.sums, components)


def _fit(plan: Plan, basis: Basis, workers: Workers) -> UpsamplerFit | None:
    """Fit the upsampler to a sample of the images, if it needs that and its fit was not given."""
    if plan.fitting is None or plan.like is not None:
        return None if plan.like is None else plan.like.fitted.upsampler
    logger.info("%s: fitting it to %d images", plan.config.upsampler, min(plan.fitting.images, len(plan.references)))
    fit = fit_upsampler(plan.fitting, plan.references, basis, workers)
    logger.info("%s: %s", plan.config.upsampler, fit.described)
    return fit


def _calibrate(
    plan: Plan, basis: Basis, fit: UpsamplerFit | None, workers: Workers
) -> tuple[npt.NDArray[np.float32] | None, float]:
    """The steps ([k] float32, None for float16), measured unless given; and an estimate of the bytes of an image."""
    sample = gather(
        workers,
        ShardWorker.calibrate,
        plan.references,
        CALIBRATION_IMAGES,
        workers.share(basis),
        workers.share(fit),
        images_in_task=_IMAGES_IN_CALIBRATION_TASK,
        what="calibration",
    )
    mean_square, nbytes = sample.sums.mean_square / sample.images, sample.sums.nbytes / sample.images
    step = choose_steps(plan.config.dtype, mean_square, plan.config.floor)
    if plan.like is None or plan.like.fitted.step is None or step is None:
        return step, nbytes
    given = plan.like.fitted.step
    ratio = step / given
    logger.info(
        "quantization steps of %s; measured on these images, they would be %.2f to %.2f times as large",
        plan.config.like, ratio.min(), ratio.max(),
    )  # fmt: skip
    return given, nbytes


def _check_space(plan: Plan, objects: Objects, image_nbytes: float) -> None:
    """Check that the store fits on a local disk.

    Raises:
        JobError: the free space is too small.
    """
    images = sum(len(plan.features.rows_of(shard)) for shard in plan.shards)
    needed = image_nbytes * images
    logger.info("store: about %s an image, %s in all", readable_size(image_nbytes), readable_size(needed))
    freed = sum(objects.list(FEATURES).values()) if plan.config.overwrite and plan.stored else 0
    advice = (
        "free some, or choose another --store, fewer --components, a smaller --output-size or a larger --error-floor"
    )
    check_space(objects, needed, advice, freed=freed)


def _stored_encoding(features: FeatureLayout, objects: Objects) -> StoreEncoding:
    store = FeatureStore(objects.uri)
    attributes = stored_attributes(objects.uri, store.attributes)
    fitted = stored_fitted(store, attributes)
    if store.layout != features:
        raise JobError(f"the array in {objects.uri} is {store.layout}, expected {features}: use --overwrite")
    return StoreEncoding(fitted.basis, fitted.step, attributes.hash, fitted.upsampler)
