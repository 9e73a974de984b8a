"""Run a worker method over a sample of the dataset on all workers, and merge the results.

Parts that make their worker fail are tried again image by image, and the images that fail by themselves are left out.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.images.sample import FixedTree, Part, Sums, next_wave
from pipeline.reporting.progress import ProgressLine
from pipeline.run.failures import beyond_single_images
from pipeline.run.workers import TaskFailed, Workers

__all__ = ["gather"]

logger = logging.getLogger(__name__)


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
        JobError: a task failed on its last attempt and not by the fault of single images, or no image is usable.
    """
    total: Part[Sums] | None = None
    tried = 0
    line = ProgressLine(what, min(images, references.num_rows) or references.num_rows, "images")
    while rows := next_wave(references.num_rows, images, tried, total.images if total else 0):
        parts = [references.take(rows[first:][:images_in_task]) for first in range(0, len(rows), images_in_task)]
        tree = FixedTree[Sums](len(parts))
        troubled: dict[int, TaskFailed] = {}
        for task, result in workers.map(method, [(part, *arguments) for part in parts], line.advance):
            if isinstance(result, TaskFailed):
                troubled[task] = result
            else:
                tree.add(task, result)
        _refuse(troubled, len(parts), what)
        for task in sorted(troubled):
            tree.add(task, _image_by_image(workers, method, parts[task], arguments, what))
        if tree.root is not None:
            total = tree.root if total is None else total.merged(tree.root)
        tried += len(rows)
    if total is None or total.images == 0:
        error = total.first_error if total else None
        raise JobError(
            f"{what}: none of the {tried:,} sampled images is usable; first error: {error or 'none was recorded'}. "
            "Check --images, and whether --min-side and --max-pixels exclude the images"
        )
    return total


def _refuse(troubled: dict[int, TaskFailed], parts: int, what: str) -> None:
    """Refuse failures that are not the fault of single images.

    Raises:
        JobError: the storage did not answer, or too many parts failed.
    """
    many = beyond_single_images(len(troubled), parts)
    for failure in troubled.values():
        if many or not failure.suspect:
            raise JobError(f"{what}: a part of the sample failed {failure.attempts} times: {failure.reason}")


def _image_by_image(
    workers: Workers, method: Callable[..., Part[Sums]], part: pa.Table, arguments: Sequence[Any], what: str
) -> Part[Sums] | None:
    """The result over the images of a part that do not fail by themselves; None if all do."""
    logger.warning("%s: a part of the sample keeps failing: trying its %d images one by one", what, part.num_rows)
    results: dict[int, Part[Sums]] = {}
    tasks = [(part.take([row]), *arguments) for row in range(part.num_rows)]
    for row, result in workers.map(method, tasks, alone=True):
        if isinstance(result, TaskFailed):
            logger.warning("%s: leaving out %s: %s", what, part["key"][row], result.reason)
        else:
            results[row] = result
    total: Part[Sums] | None = None
    for row in sorted(results):
        total = results[row] if total is None else total.merged(results[row])
    return total
