"""FeatUp's implicit networks: error on held-out views over time, with FeatUp's and our schedule; cost of a step.

    python -m benchmarks.upsamplers.implicit_featup --photos-each 3 --backbone vit

Each photograph is fitted alone and evaluated as in `benchmarks.upsamplers.implicit`, both through the downsampler
fitted with the network (``own_error``) and through the Gaussian pooling used for the solver (``held_out_error``). The
time of a step is measured as implemented by FeatUp (views padded, enlarged and cropped, their patches unfolded) and as
implemented here.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.upsamplers.held_out import SIZE, Judge, K, build, fitted_basis, photos, pooling_file
from pipeline.features.backbone import Backbone
from pipeline.run.feature_worker import pick_device
from pipeline.upsamplers.implicit.downsample import AttentionDownsamplers, Windows
from pipeline.upsamplers.implicit.fit import fit_networks
from pipeline.upsamplers.implicit.loss import LossWeights, Uncertainty, loss_of_images, magnitude
from pipeline.upsamplers.implicit.network import ImplicitNetworks
from pipeline.upsamplers.implicit.schedule import DEFAULT, FAITHFUL, Schedule, sample_views
from pipeline.upsamplers.multiview.pooling import PoolingModel
from pipeline.upsamplers.multiview.trials import relative_error
from pipeline.views.downsample import blur_matrix
from pipeline.views.features import JitterMatrices, view_features
from pipeline.views.jitter import Jitter

SCHEDULES = {"implicit, FeatUp's schedule": FAITHFUL, "implicit, default schedule": DEFAULT}


def fit_one(judge: Judge, photo: Tensor, schedule: Schedule) -> dict[str, Any]:
    """Fit one photograph [1, 3, H, W].

    Returns:
        CPU seconds of extraction and fit, and final errors; and for each check on the schedule's own held-out views the
        seconds of the fit and the error through the fitted downsampler.
    """
    backbone, start = judge.backbone, time.process_time()
    seen = [_seen(backbone, photo, views, judge.basis) for views in sample_views(schedule, backbone.size)]
    extraction_s = time.process_time() - start
    scale = backbone(photo).square().mean().sqrt()  # as in `pipeline.upsamplers.implicit.upsampler`
    spread = (seen[1] - seen[1].mean((1, 3, 4), keepdim=True)).square().mean() / scale.square()
    curve: list[dict[str, float]] = []
    start = time.process_time()

    def look(step: int, errors: Tensor) -> None:
        curve.append({"step": step, "s": time.process_time() - start, "own_error": float(errors[0] / spread)})
        print(json.dumps(curve[-1]), flush=True)

    targets, held_out = (views / scale for views in seen)
    fitted = fit_networks(photo, targets, held_out, schedule, stride_px=backbone.reduction, on_check=look)
    fit_s = time.process_time() - start
    if fitted.failures:
        raise RuntimeError(f"not fitted: {fitted.failures}")
    judged = judge.seen(photo)
    cell_px = schedule.cell(backbone.reduction)
    windows = Windows.of(judge.jitters, backbone.grid, cell_px, photo.device)
    with torch.no_grad():
        high = fitted.networks.render(photo)
        flat = high.flatten(2).mT
        own = fitted.downsamplers(torch.cat([magnitude(flat)[..., None], flat], 2), windows)[0, ..., 1:].movedim(3, 1)
    error, cosine = judge.error(high * scale, judged, with_bias=False)
    return {
        "extraction_s": extraction_s,
        "fit_s": fit_s,
        "held_out_error": error,
        "own_error": relative_error(own * scale, judged),
        "cosine": cosine,
        "kept_after": int(fitted.steps[0]),
        "curve": curve,
    }


def main(
    photos_each: int = 3,
    backbone: str = "vit",
    schedules: tuple[str, ...] = tuple(SCHEDULES),
    folder: Path = Path("pooling_models"),
    device: str = "auto",
) -> None:
    """Measure; append a row per schedule.

    Args:
        photos_each: number of photographs of the validation part, fitted one at a time; FeatUp's schedule takes minutes
            for each.
        backbone: "lite0" or "vit".
        schedules: names in `SCHEDULES`.
        folder: folder of the pooling models of `benchmarks.upsamplers.implicit`.
        device: "auto", "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    chosen = torch.device(pick_device(device))
    with torch.inference_mode():
        network = build(backbone, chosen)
        downsampler = PoolingModel.read(pooling_file(folder, backbone, chosen.type))
        judge = Judge.of(network, downsampler, fitted_basis(network, chosen))
        images = photos("val", photos_each, chosen)
        for method in schedules:
            schedule = SCHEDULES[method]
            fits = [fit_one(judge, photo, schedule) for photo in images]
            row = {
                "backbone": backbone,
                "method": method,
                "photos": photos_each,
                **averaged(fits),
                "views": schedule.views,
            }
            rows.append("implicit", {**row, "k": K, "size": list(SIZE), "threads": 1, **rows.measured_on()})
            print(json.dumps(row), flush=True)
    row = {"backbone": backbone, "k": K, "threads": 1, **step_seconds(images, network), **rows.measured_on()}
    rows.append("implicit_steps", row)
    print(json.dumps(row))


def averaged(fits: list[dict[str, Any]]) -> dict[str, Any]:
    """Average over photographs; curves are truncated to the shortest."""
    names = "held_out_error", "own_error", "cosine", "extraction_s", "fit_s", "kept_after"
    means = {name: round(statistics.mean(fit[name] for fit in fits), 4) for name in names}
    looks = zip(*(fit["curve"] for fit in fits), strict=False)
    means["curve"] = [{name: round(statistics.mean(look[name] for look in at), 4) for name in at[0]} for at in looks]
    return means


def step_seconds(images: list[Tensor], backbone: Backbone) -> dict[str, float]:
    """Seconds of a step: FeatUp's implementation, ours, and ours for four images together (in total)."""
    jitters = sample_views(Schedule(views=10), SIZE)[0]
    cell_px = Schedule().cell(backbone.reduction)
    with torch.inference_mode(False):
        plain = [plain_step(images[0].clone(), K, backbone.grid, cell_px, jitters) for _ in range(3)]
    four = torch.cat([images[i % len(images)] for i in range(4)])
    return {
        "plain_step_s": statistics.median(plain),
        "step_s": seconds_of_a_step(images[0], K, backbone.grid, backbone.reduction),
        "step_of_four_s": seconds_of_a_step(four, K, backbone.grid, backbone.reduction),
    }


def seconds_of_a_step(images: Tensor, k: int, grid: tuple[int, int], stride_px: int, steps: int = 5) -> float:
    """Seconds of a warm step of fitting images together; CPU time if the images are on the CPU."""
    clock = time.perf_counter if images.is_cuda else time.process_time
    schedule = Schedule(views=20, held_out=1, steps=2 * steps, check_every=steps, patience=None)
    targets = torch.randn(len(images), 20, k, *grid, device=images.device)
    looks: list[float] = []
    fit_networks(
        images,
        targets,
        targets[:, :1],
        schedule,
        stride_px=stride_px,
        on_check=lambda step, errors: looks.append(clock()),
    )
    return (looks[1] - looks[0]) / steps


def plain_step(image: Tensor, k: int, grid: tuple[int, int], cell_px: int, jitters: Sequence[Jitter]) -> float:
    """CPU seconds of one step for one image [1, 3, H, W] as implemented by FeatUp, with random targets."""
    networks, downsampler = ImplicitNetworks(1, k), AttentionDownsamplers(1, k + 1, cell_px)
    uncertainty = Uncertainty(1, k)
    networks.look_at(image)
    targets = torch.randn(1, len(jitters), *grid, k)
    start = time.process_time()
    high = networks.render(image)
    both = torch.cat([magnitude(high.movedim(1, 3))[:, None], high], 1)
    low = torch.stack([plain_downsample(both, jitter, downsampler, grid) for jitter in jitters], 1).movedim(2, 4)
    size = (image.shape[2], image.shape[3])
    flat = both.flatten(2).mT
    loss_of_images(flat, low, targets, uncertainty(targets), size, LossWeights()).sum().backward()
    return time.process_time() - start


def plain_downsample(maps: Tensor, jitter: Jitter, downsampler: AttentionDownsamplers, grid: tuple[int, int]) -> Tensor:
    """Downsample one view of maps [1, c, H, W] to [1, c, h, w] by explicit padding, enlarging and unfolding."""
    H, W = jitter.size
    cell = downsampler.weight.shape[1]
    padded = F.pad(maps, [jitter.pad_px] * 4, mode="reflect")
    if jitter.zoom > 1:
        padded = F.interpolate(padded, scale_factor=jitter.zoom, mode="bilinear", recompute_scale_factor=False)
    view = padded[..., jitter.row_px : jitter.row_px + H, jitter.column_px : jitter.column_px + W]
    view = view.flip(3) if jitter.flip else view
    kernel = blur_matrix(20)[10, 8:13].to(view)
    window = torch.outer(kernel, kernel).expand(maps.shape[1], 1, 5, 5)
    blurred = F.conv2d(F.pad(view, [2] * 4, mode="reflect"), window, groups=maps.shape[1])
    stride = [
        (length - cell) // max(cells - 1, 1) + (cells == 1) * length for length, cells in zip((H, W), grid, strict=True)
    ]
    patches = blurred.unfold(2, cell, stride[0]).unfold(3, cell, stride[1])[:, :, : grid[0], : grid[1]].flatten(4)
    logits = torch.einsum("nchwp,nc->nhwp", patches, downsampler.saliency_weight) + downsampler.saliency_bias
    attention = (logits * downsampler.weight.flatten() + downsampler.bias.flatten()).softmax(3)
    return torch.einsum("nchwp,nhwp->nchw", patches, attention)


def _seen(backbone: Backbone, images: Tensor, jitters: list[Jitter], basis: tuple[Tensor, Tensor]) -> Tensor:
    parts = [jitters[first : first + 64] for first in range(0, len(jitters), 64)]
    return torch.cat([view_features(backbone, images, JitterMatrices.of(p, images.device), basis) for p in parts], 1)


if __name__ == "__main__":
    tyro.cli(main)
