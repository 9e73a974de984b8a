"""Fit the pooling model of a backbone on a sample of a dataset: the weights of ``--upsampler multiview``."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

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
from pipeline.run.resources import all_cores, available_cores, torch_threads
from pipeline.upsamplers.multiview.fit import fit_pooling, usual_settings
from pipeline.upsamplers.multiview.pooling import Origin, PoolingModel
from pipeline.upsamplers.multiview.spool import full_bias, sampled_views
from pipeline.upsamplers.multiview.trials import Outcome, Trial, ViewSample, run_trial
from pipeline.upsamplers.multiview.views import MOST_VIEWS
from schemas.options import LEAST_FIT_IMAGES, FitPoolingConfig

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
    settings = usual_settings(backbone.reduction, config.views, config.solver_stride)
    with ExitStack() as stack:
        with all_cores():
            spooled = stack.enter_context(
                sampled_views(
                    backbone,
                    images,
                    views=config.views,
                    order=settings.order,
                    held_out=config.held_out_views,
                    components=components,
                )
            )
        sample = spooled.sample
        if len(sample) < config.fit_images:
            raise JobError(_too_few(len(sample), config.fit_images, "have usable features"))

        stack.enter_context(torch_threads(1))  # a trial uses one core
        pool = stack.enter_context(ThreadPoolExecutor(available_cores(), "trial"))

        def run(sample: ViewSample, trials: Sequence[Trial]) -> list[Outcome]:
            return list(pool.map(lambda trial: run_trial(sample, trial, worker.device), trials))

        fit = fit_pooling(len(sample), sample.low.shape[2:], settings, backbone.reduction, partial(run, sample))
        begun_with = replace(settings, sigma_px=fit.settings.sigma_px)
        bias = full_bias(spooled, begun_with, fit.alternations, fit.bias_images, run)
    account = {"images": config.images, "fit": config.fit, "densefeat": __version__, "torch": torch.__version__}
    origin = Origin(backbone.identity(), backbone.size, backbone.grid, {**account, **fit.account})
    write_output_file("--output", config.output, PoolingModel(bias, fit.settings, origin).to_bytes())
    logger.info("multiview: %s\nwrote %s", fit.describe(), config.output)


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


def _too_few(got: int, asked: int, what: str) -> str:
    less = f", or --fit-images {got}; with fewer than 18 the bias is worse" if got >= LEAST_FIT_IMAGES else ""
    return f"--fit-images {asked}, but only {got} of the sample {what}: give more images{less}"
