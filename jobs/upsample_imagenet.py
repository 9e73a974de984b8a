"""The main job: compute dense, high-resolution features of images and write them to a store.

On this machine::

    python -m jobs.upsample_imagenet --images photos/ --store features/

On a Ray cluster::

    ray job submit --working-dir . -- python jobs/upsample_imagenet.py --images s3://… --store s3://…
"""

import logging
import time

from jobs.command_line import DONE, FAILED, run
from schemas.options import UpsampleConfig

logger = logging.getLogger(__name__)


def upsample(config: UpsampleConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        JobError: the job cannot be done as requested.
    """
    started = time.monotonic()
    logger.info("planning: images, backbone, upsampler and store are looked at first")
    from pipeline.run.job import carry_out
    from pipeline.run.planning.describe import describe
    from pipeline.run.planning.measure import measure
    from pipeline.run.planning.plan import make_plan
    from pipeline.run.ray.early import EarlyWorkers

    with EarlyWorkers(config) as early:
        plan = early.beside(lambda listed: make_plan(config, listed))
        logger.info("%s", describe(plan))
        if config.measure:
            logger.info("%s", measure(plan).describe(on_ray=plan.stages is None))
        if config.dry_run:
            return DONE
        report = carry_out(plan, started, early)
    logger.info("%s", report.describe())
    if plan.waiting and report.complete:
        return max(upsample(config), FAILED if report.too_many_failed else DONE)
    return FAILED if report.given_up or report.too_many_failed else DONE


if __name__ == "__main__":
    run(UpsampleConfig, upsample, __doc__ or "", interrupted="nothing was stored: run the same command again")
