"""Fit the pooling model of a backbone for --upsampler multiview: how it pools, its positional bias, how hard to fit.

python -m jobs.fit_pooling --images photos/ --output pooling.safetensors
python -m jobs.upsample_imagenet --images photos/ --store features/ --upsampler multiview --upsampler-weights …
"""

from jobs.command_line import DONE, run
from schemas.options import FitPoolingConfig


def fit(config: FitPoolingConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        JobError: it cannot be done as asked.
    """
    from pipeline.train.pooling import make_pooling_model

    make_pooling_model(config)
    return DONE


if __name__ == "__main__":
    run(FitPoolingConfig, fit, __doc__ or "")
