"""Fit the pooling model of a backbone on a sample of a dataset: the weights of ``--upsampler multiview``."""

import logging

import pyarrow as pa
import torch
from torch import Tensor

from densefeat import __version__
from pipeline.errors import JobError
from pipeline.images.sample import usable_images
from pipeline.io.outputs import check_output_file, write_output_file
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import FeatureWorker
from pipeline.run.planning.plan import feature_spec
from pipeline.run.resources import all_cores
from pipeline.upsamplers.multiview.fit import Fit, fit_pooling
from pipeline.upsamplers.multiview.pooling import Origin, PoolingModel
from pipeline.upsamplers.multiview.sample import sampled_views
from pipeline.upsamplers.multiview.views import MOST_VIEWS
from schemas.options import FitPoolingConfig

__all__ = ["make_pooling_model"]

logger = logging.getLogger(__name__)


def make_pooling_model(config: FitPoolingConfig) -> None:
    """Fit the model, write it to ``--output``, and log its errors on held-out views.

    Raises:
        JobError: an option does not fit, or the dataset has too few usable images.
    """
    if config.views > MOST_VIEWS:
        raise JobError(
            f"--views: got {config.views}, expected at most {MOST_VIEWS}: the views after those are held out"
        )
    spec, references, stages = feature_spec(config)
    backbone = stages.backbone
    check_output_file("--output", config.output)  # before the work, not after it
    worker = FeatureWorker(spec, stages)
    images = _sample_images(worker, references, config.fit_images)
    components = min(config.components, backbone.num_chs)
    with (
        all_cores(),
        sampled_views(
            backbone, images, views=config.views, held_out=config.held_out_views, components=components
        ) as sample,
    ):
        if len(sample.images) < config.fit_images:
            raise JobError(_too_few(len(sample.images), config.fit_images, "have usable features"))
        result = fit_pooling(sample, backbone.reduction, config.solver_stride, worker.device)
    account = {"images": config.images, "fit": config.fit, "densefeat": __version__, "torch": torch.__version__}
    origin = Origin(backbone.identity(), backbone.size, backbone.grid, {**account, **result.account})
    write_output_file("--output", config.output, PoolingModel(result.bias, result.settings, origin).to_bytes())
    logger.info("%s\nwrote %s", _describe(result), config.output)


def _sample_images(worker: FeatureWorker, references: pa.Table, count: int) -> Tensor:
    """Decode ``count`` usable images, spread over the dataset: [count, 3, H, W] uint8.

    Raises:
        JobError: the dataset does not have enough usable images.
    """
    if references.num_rows < count:
        raise JobError(_too_few(references.num_rows, count, "are available"))
    images, error = usable_images(references, count, lambda sample: worker.loader.batches(sample, StageSeconds()))
    if len(images) < count:
        raise JobError(_too_few(len(images), count, f"can be used{f' (the first error: {error})' if error else ''}"))
    return images


def _describe(result: Fit) -> str:
    """Human-readable summary of the fit."""
    settings, errors = result.settings, result.account["held_out_error"]
    curve = {(r, n): error for r, n, error in errors["by_regularisation_and_iterations"]}
    error = curve[settings.regularisation, settings.iterations]
    return (
        f"error on held-out views of the {result.account['judging_images']} images that settings were chosen on: "
        f"{errors['bilinear']:.4f} bilinear, {errors['bilinear_and_bias']:.4f} with the bias, "
        f"{error:.4f} multiview ({error / errors['bilinear']:.2f} of bilinear)\n"
        f"a Gaussian of {settings.sigma_px:.2f} pixels, {settings.views} views, regularisation "
        f"{settings.regularisation:g}, {settings.iterations} iterations"
    )


def _too_few(got: int, asked: int, what: str) -> str:
    return (
        f"--fit-images {asked}, but only {got} of the sample {what}: give more images, or a smaller --fit-images; with "
        "fewer than 18 the bias is worse"
    )
