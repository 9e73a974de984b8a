"""From a plan to a store that takes shards: fit the basis, choose the quantization steps, set the store up."""

import logging
import shutil
import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from densefeat.layout import FEATURES
from densefeat.objects import Objects
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.gather import gather
from pipeline.pca import Basis, fit
from pipeline.plan import Plan, readable_size
from pipeline.quantize import steps
from pipeline.software import software_versions
from pipeline.storage_errors import explain_storage_error
from pipeline.store import delete_store, existing_store, set_up, step_sha256
from pipeline.worker import Encoding
from pipeline.workers import Workers
from schemas.attributes import StoreAttributes, differences
from schemas.index import pending_index

logger = logging.getLogger(__name__)

_IMAGES_IN_TASK = 32  # images of the PCA sample in one task
_OTHERS_SETUP_S = 120.0
_CALIBRATION_IMAGES = 32  # images whose upsampled features set the quantization steps
_IMAGES_IN_CALIBRATION_TASK = 4  # few: an upsampler that fits each image takes minutes for one


def prepare(plan: Plan, objects: Objects, workers: Workers) -> Encoding:
    """Make the store ready for shards, or find it ready.

    Raises:
        JobError: the sample cannot be used, the store does not fit on the disk, somebody else set it up meanwhile.
    """
    if plan.config.resume and plan.stored and plan.stored.setup_complete:
        return _stored_encoding(objects)
    basis = plan.basis or fit_basis(plan.references, plan.features.components, plan.config.pca_images, workers)
    explained = float(basis.explained_variance_ratio.sum())
    logger.info("PCA: %d components explain %.1f %% of the variance", len(basis.components), 100 * explained)
    step, image_nbytes = _calibrate(plan, basis, workers)
    _check_space(plan, objects, image_nbytes)
    attributes = StoreAttributes(
        configuration={**plan.configuration, "pca": {**plan.configuration["pca"], "basis": basis.digest}},
        versions=software_versions(),
        class_names=plan.class_names,
        explained_variance=explained,
        step_sha256=step_sha256(step),
    )
    if plan.config.overwrite and plan.stored:
        delete_store(objects)
    try:
        # Claimed by a run that died, or by one that works on it this moment: fitting took a while.
        claimed = plan.config.resume and existing_store(objects)
        if claimed and claimed.setup_complete:
            return _join(objects, attributes)
        set_up(objects, attributes, plan.features, basis, step, pending_index(plan.references), claimed=bool(claimed))
    except FileExistsError:
        if plan.config.resume:
            return _join(objects, attributes)
        raise JobError(f"another job set up {objects.uri} in the meantime: use --resume to work with it") from None
    except OSError as error:
        raise explain_storage_error(error, objects.uri) or error from error
    return Encoding(basis, step, attributes.hash)


def _join(objects: Objects, attributes: StoreAttributes) -> Encoding:
    """Work with the store that another job has just set up, if it set up the same one.

    Raises:
        JobError: it is another one, or its setup does not come to an end.
    """
    end = time.monotonic() + _OTHERS_SETUP_S
    while time.monotonic() < end:
        stored = existing_store(objects)
        if stored is not None and stored.hash != attributes.hash:
            different = "; ".join(differences(stored.configuration, attributes.configuration))
            raise JobError(f"another job set up {objects.uri} in the meantime, with other options: {different}")
        if stored is not None and stored.setup_complete:
            return _stored_encoding(objects)
        time.sleep(1)
    raise JobError(f"another job began to set up {objects.uri} and did not finish: run this one again with --resume")


def fit_basis(references: pa.Table, k: int, images: int, workers: Workers) -> Basis:
    """Fit ``k`` components on a sample of ``images`` (0: all) usable images, spread over the workers.

    Raises:
        JobError: too few images can be used.
    """
    logger.info("PCA: fitting %d components on %d images", k, min(images, references.num_rows) or references.num_rows)
    sample = gather(workers, "moments", references, images, images_in_task=_IMAGES_IN_TASK, what="PCA")
    return fit(sample.sums, k)


def _calibrate(plan: Plan, basis: Basis, workers: Workers) -> tuple[npt.NDArray[np.float32] | None, float]:
    """Quantization steps [k], None for float16; and the bytes that an image will take, about."""
    sample = gather(
        workers,
        "calibrate",
        plan.references,
        _CALIBRATION_IMAGES,
        workers.share(basis),
        images_in_task=_IMAGES_IN_CALIBRATION_TASK,
        what="calibration",
    )
    mean_square, nbytes = sample.sums.mean_square / sample.images, sample.sums.nbytes / sample.images
    return steps(mean_square, plan.config.error_floor) if plan.config.dtype == "int8" else None, nbytes


def _check_space(plan: Plan, objects: Objects, image_nbytes: float) -> None:
    """Compare what the store will take with what a local disk has."""
    images = sum(len(plan.features.rows_of(shard)) for shard in plan.shards)
    needed = image_nbytes * images
    logger.info("store: about %s an image, %s in all", readable_size(image_nbytes), readable_size(needed))
    folder = objects.local_path
    if folder is None:
        return
    free = shutil.disk_usage(next(path for path in [folder, *folder.parents] if path.exists())).free
    if plan.config.overwrite and plan.stored:
        free += sum(objects.list(FEATURES).values())
    if needed > free:
        raise JobError(
            f"no space for {objects.uri}: about {readable_size(needed)} are needed, {readable_size(free)} are free; "
            "free some, choose another --store, fewer --components, a smaller --output-size or a greater --error-floor"
        )


def _stored_encoding(objects: Objects) -> Encoding:
    store = FeatureStore(objects.uri)
    basis = Basis.of_store(store)
    if basis.digest != store.attributes["configuration"]["pca"]["basis"]:
        raise JobError(f"the PCA basis in {objects.uri} is not the one that its attributes name: use --overwrite")
    if step_sha256(store.step) != store.attributes["step_sha256"]:
        raise JobError(f"the steps in {objects.uri} are not those that its attributes name: use --overwrite")
    return Encoding(basis, store.step, store.attributes["configuration_hash"])
