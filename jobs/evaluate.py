"""Compare features on a task: stores, or configurations of the main job whose features are computed first.

For example::

    python -m jobs.evaluate --task segmentation --features store/ other/ --labels masks/ --report report/
    python -m jobs.evaluate --task segmentation --images photos/ --labels masks/ --report report/ \\
        --features name=bilinear,upsampler=bilinear name=jbu,upsampler=jbu

It prints a table, and writes report.json and report.html, a page with pictures. docs/evaluation.md describes the tasks
and their labels.
"""

from jobs.command_line import DONE, run
from schemas.evaluate_options import EvaluateConfig


def evaluate(config: EvaluateConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        JobError: the job cannot be done as requested.
        StoreError: a store is missing or damaged.
    """
    from pipeline.evaluate import run as evaluation

    print(evaluation.evaluate(config).describe())
    return DONE


if __name__ == "__main__":
    run(EvaluateConfig, evaluate, __doc__ or "")
