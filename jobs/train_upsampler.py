"""Train an upsampler for one backbone, or one that serves all backbones; writes weights for --upsampler-weights.

A joint bilateral upsampler, which depends only on the image and so serves every backbone, trained on two backbones::

    python -m jobs.train_upsampler --images photos/ --output jbu/ \\
        --backbones tf_efficientnet_lite0@-2 vit_small_patch14_dinov2.lvd142m@10 --held-out-backbone resnet18@2
    python -m jobs.upsample_imagenet --images photos/ --store features/ --upsampler-weights jbu/upsampler.safetensors

LiFT, for one backbone and layer::

    python -m jobs.train_upsampler --upsampler lift --images photos/ --output lift/ --backbones vit_small_patch16_224

``--output`` also receives losses.csv, held_out.csv, curves.png, and the checkpoints from which --resume continues.
"""

import logging

from jobs.command_line import DONE, FAILED, run
from pipeline.errors import TrainingDiverged
from schemas.train_options import TrainConfig

logger = logging.getLogger(__name__)


def train_upsampler(config: TrainConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        JobError: the job cannot be done as requested.
    """
    import torch

    from pipeline.run.feature_worker import pick_device
    from pipeline.run.resources import all_cores, available_cores
    from pipeline.train.loop import train
    from pipeline.train.output import WEIGHTS, claimed_output
    from pipeline.train.plan import make_train_plan
    from pipeline.train.world import World

    device = torch.device(pick_device(config.device)) if config.workers == 1 else None
    plan, backbones = make_train_plan(config)
    logger.info("%s", plan.describe())
    if config.dry_run:
        return DONE
    try:
        with claimed_output(config.output, plan.configuration, begun=plan.begun):
            if device is None:
                from pipeline.train import ray_train  # deferred: importing ray takes a second

                ray_train.train_on_ray(plan)
            else:
                with all_cores():
                    train(plan, World(device), threads=available_cores(), built=backbones)
    except TrainingDiverged as error:
        logger.error("%s", error)
        return FAILED
    logger.info("wrote %s/%s: use it as --upsampler-weights", config.output.rstrip("/"), WEIGHTS)
    return DONE


if __name__ == "__main__":
    run(
        TrainConfig,
        train_upsampler,
        __doc__ or "",
        interrupted="--resume continues from the last checkpoint, if there is one yet, with the same loss curve",
    )
