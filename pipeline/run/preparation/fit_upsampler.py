"""Fit an upsampler to a sample of the dataset, if it needs that: its samples and trials run on all workers."""

import functools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.reporting.progress import ProgressLine
from pipeline.run.preparation.gather import gather
from pipeline.run.shard_worker import ShardWorker
from pipeline.run.workers import TaskFailed, Workers
from pipeline.upsamplers.fitting import Fitting, UpsamplerFit

__all__ = ["fit_upsampler"]

_IMAGES_IN_TASK = 2  # the backbone runs on tens of views of each


def fit_upsampler(fitting: Fitting, references: pa.Table, basis: Basis, workers: Workers) -> UpsamplerFit:
    """Fit an upsampler.

    Args:
        fitting: how.
        references: references of the dataset.
        basis: in whose components it is fitted.
        workers: the workers.

    Raises:
        JobError: no image is usable, or a part of the work failed on its last attempt.
    """
    gathered = gather(
        workers,
        ShardWorker.fitting_sample,
        references,
        fitting.images,
        workers.share(basis),
        images_in_task=_IMAGES_IN_TASK,
        what="fit of the upsampler",
    )
    sample: Any = functools.reduce(lambda one, other: one.merged(other), gathered.sums.samples).first(fitting.images)
    shared = workers.share(sample)
    line = ProgressLine("fit of the upsampler", None, "trials")

    def run(trials: Sequence[Any]) -> list[Any]:
        results: list[Any] = [None] * len(trials)
        for task, result in workers.map(ShardWorker.fitting_trial, [(shared, trial) for trial in trials], line.advance):
            if isinstance(result, TaskFailed):
                raise JobError(f"the fit of the upsampler failed {result.attempts} times: {result.reason}")
            results[task] = result
        return results

    return fitting.fit(sample, run)
