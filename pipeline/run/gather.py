"""Running a worker's method over a sample of the dataset, on all workers, and merging what it returns."""

from typing import Any

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.images.sample import FixedTree, Part, next_wave
from pipeline.reporting.progress_line import ProgressLine
from pipeline.run.workers import TaskFailed, Workers

__all__ = ["gather"]


def gather(
    workers: Workers, method: str, references: pa.Table, images: int, *arguments: Any, images_in_task: int, what: str
) -> Part[Any]:
    """Call a worker's ``method(references, *arguments)`` on parts of a sample, and merge what it returns.

    Args:
        workers: who does it.
        method: returns a `Part`.
        references: of the dataset.
        images: usable ones wanted; 0: the whole dataset.
        arguments: of the method, beside the references.
        images_in_task: images in one task.
        what: for messages, e.g. "PCA".

    Returns:
        Over at least ``images`` usable images if the dataset has them, over one at least.

    Raises:
        JobError: a task failed for good, or no image is usable.
    """
    total: Part[Any] | None = None
    tried = 0
    line = ProgressLine(what, min(images, references.num_rows) or references.num_rows, "images")
    while rows := next_wave(references.num_rows, images, tried, total.images if total else 0):
        sample = references.take(rows)
        tasks = [(sample.slice(first, images_in_task), *arguments) for first in range(0, len(rows), images_in_task)]
        tree = FixedTree[Any](len(tasks))
        for task, result in workers.map(method, tasks, line.advance):
            if isinstance(result, TaskFailed):
                raise JobError(f"{what}: a part of the sample failed {result.attempts} times: {result.reason}")
            tree.add(task, result)
        total = tree.root if total is None else total.merged(tree.root)
        tried += len(rows)
    if total is None or total.images == 0:
        error = total.first_error if total else None
        raise JobError(
            f"{what}: none of {tried:,} sampled images is usable; the first error is: {error or 'none was recorded'}. "
            "Check --images, and --min-side and --max-pixels if they leave images out"
        )
    return total
