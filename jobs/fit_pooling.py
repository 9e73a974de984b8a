"""Fit the weights of --upsampler multiview for a backbone: its pooling, its positional bias, and solver settings.

Fit them, then use them in the main job::

    python -m jobs.fit_pooling --images photos/ --output pooling.safetensors
    python -m jobs.upsample_imagenet --images photos/ --store features/ --upsampler multiview --upsampler-weights …
"""

from jobs.command_line import DONE, run
from schemas.options import FitPoolingConfig


def fit(config: FitPoolingConfig) -> int:
    """Run the job and return its exit code.

    Raises:
        JobError: the job cannot run as configured.
    """
    from pipeline.train.pooling import make_pooling_model

    make_pooling_model(config)
    return DONE


if __name__ == "__main__":
    run(FitPoolingConfig, fit, __doc__ or "")
