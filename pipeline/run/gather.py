"""Run a worker method over a sample of the dataset on all workers, and merge the results."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.images.sample import FixedTree, Part, Sums, next_wave
from pipeline.reporting.progress import ProgressLine
from pipeline.run.workers import TaskFailed, Workers

__all__ = ["gather"]


def gather(
    workers: Workers,
    method: Callable[..., Part[Sums]],
    references: pa.Table,
    images: int,
    *arguments: Any,
    images_in_task: int,
    what: str,
) -> Part[Sums]:
    """Call ``method(worker, references, *arguments)`` on parts of a sample, and merge the results.

    Args:
        workers: the workers to call it on.
        method: method of the worker's class, unbound.
        references: references of the dataset.
        images: number of usable images wanted; 0: the whole dataset.
        arguments: further arguments of the method.
        images_in_task: images in one task.
        what: name of the result in messages, e.g. "PCA".

    Returns:
        The merged result over at least ``images`` usable images, or over fewer, at least one, if the dataset has too
        few of them.

    Raises:
        JobError: a task failed on its last attempt, or no image is usable.
    """
    total: Part[Sums] | None = None
    tried = 0
    line = ProgressLine(what, min(images, references.num_rows) or references.num_rows, "images")
    while rows := next_wave(references.num_rows, images, tried, total.images if total else 0):
        sample = references.take(rows)
        tasks = [(sample.slice(first, images_in_task), *arguments) for first in range(0, len(rows), images_in_task)]
        tree = FixedTree[Sums](len(tasks))
        for task, result in workers.map(method, tasks, line.advance):
            if isinstance(result, TaskFailed):
                raise JobError(f"{what}: a part of the sample failed {result.attempts} times: {result.reason}")
            tree.add(task, result)
        total = tree.root if total is None else total.merged(tree.root)
        tried += len(rows)
    if total is None or total.images == 0:
        error = total.first_error if total else None
        raise JobError(
            f"{what}: none of the {tried:,} sampled images is usable; first error: {error or 'none was recorded'}. "
            "Check --images, and whether --min-side and --max-pixels exclude the images"
        )
    return total
