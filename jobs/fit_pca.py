"""Fit a PCA basis on a dataset's low-resolution features, to be shared by several stores (e.g. train and validation).

For example::

    python -m jobs.fit_pca --images photos/ --output basis.npz
    python -m jobs.upsample_imagenet --images others/ --store features/ --pca basis.npz
"""

import logging

from jobs.command_line import DONE, run
from schemas.options import DEFAULT_COMPONENTS, FitPcaConfig

logger = logging.getLogger(__name__)


def fit_pca(config: FitPcaConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        JobError: the job cannot be done as requested.
    """
    from pipeline.io.outputs import check_output_file, write_output_file
    from pipeline.run.job import open_workers
    from pipeline.run.planning.plan import feature_spec
    from pipeline.run.preparation.prepare import fit_basis
    from pipeline.run.resources import fits_this_process

    spec, references, stages = feature_spec(config)
    backbone = stages.backbone
    check_output_file("--output", config.output)  # before the work
    components = config.components or min(DEFAULT_COMPONENTS, backbone.num_chs)
    inline = stages if fits_this_process(config.worker_range, config.device, references.num_rows) else None
    with open_workers(spec, inline, config, attempts=3, stall_timeout_s=1800) as workers:
        basis = fit_basis(references, components, config.pca_images, workers)
    provenance = {
        "backbone": backbone.identity(),
        "size": list(config.size_px),
        "fit": config.fit,
        "images": config.images,
        "fitted_on_images": min(config.pca_images or references.num_rows, references.num_rows),
    }
    write_output_file("--output", config.output, basis.to_npz(provenance))
    k = len(basis.components)
    for count in sorted({1, 8, 32, 64, 128, k}):
        if count <= k:
            share = 100 * basis.explained_variance_ratio[:count].sum()
            logger.info("%4d components explain %5.1f%% of the variance", count, share)
    logger.info("wrote %s", config.output)
    return DONE


if __name__ == "__main__":
    run(FitPcaConfig, fit_pca, __doc__ or "")
