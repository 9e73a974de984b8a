"""FeatUp's implicit networks: error on held-out views over steps and seconds, one image at a time and batched.

    python -m benchmarks.implicit_featup

For benchmarks/implicit.py to call: `curve` fits photographs with a schedule, `seconds_of_a_step` times a step by number
of images, `plain_step` FeatUp's way of doing one (views padded, enlarged and cropped, their patches unfolded).
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from pipeline.backbone import Backbone
from pipeline.downsample import blur_matrix
from pipeline.implicit_downsample import AttentionDownsamplers
from pipeline.implicit_fit import fit_networks
from pipeline.implicit_loss import LossWeights, Uncertainty, loss_of_images, magnitude
from pipeline.implicit_network import ImplicitNetworks
from pipeline.implicit_schedule import Schedule, sample_views
from pipeline.jitter import Jitter, apply_matrices, view_matrices
from pipeline.view_features import JitterMatrices, project, view_features

_SIGMA_PX = 5.0  # of the Gaussian that pools for upsamplers without a downsampler of their own


def curve(backbone: Backbone, images: Tensor, basis: tuple[Tensor, Tensor], schedule: Schedule) -> dict[str, Any]:
    """Fit images together.

    Args:
        backbone: on the images' device.
        images: [N, 3, H, W] uint8.
        basis: mean [C] and components [k, C].
        schedule: what to fit.

    Returns:
        Seconds, elapsed and of the processor, of feature extraction and of the fit; squared error on held-out views,
        relative to their square: after each look, through each image's own downsampler (``error``), and of the final
        features and of bilinear ones through the same Gaussian pooling (``pooled``, ``bilinear``).
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    fitted, held = sample_views(schedule, backbone.size)
    seen = [_seen(backbone, images, views, basis) for views in (fitted, held)]
    extraction_s, extraction_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    scale = seen[1].square().mean((1, 2, 3, 4), keepdim=True).sqrt() * (len(basis[1]) / len(basis[0])) ** 0.5
    targets, held_targets = (t / scale for t in seen)
    low = project(backbone(images), *basis) / scale[:, 0]
    square = held_targets.square().flatten(1).mean(1)
    start, start_cpu, steps = time.perf_counter(), time.process_time(), []

    def look(step: int, errors: Tensor) -> None:
        cpu_s = time.process_time() - start_cpu
        row = {"step": step, "s": time.perf_counter() - start, "cpu_s": cpu_s, "error": (errors / square).tolist()}
        steps.append(row)
        print(json.dumps(row), flush=True)

    fit = fit_networks(images, targets, held_targets, schedule, stride_px=backbone.reduction, on_check=look)
    with torch.no_grad():
        high = fit.networks.render(images)
    bilinear = F.interpolate(low, images.shape[2:], mode="bilinear", align_corners=False)
    return {
        "extraction_s": extraction_s,
        "extraction_cpu_s": extraction_cpu_s,
        "fit_s": steps[-1]["s"],
        "bilinear": pooled_error(bilinear, held, held_targets),
        "pooled": pooled_error(high, held, held_targets),
        "kept_after": fit.steps.tolist(),
        "failures": {image: str(error) for image, error in fit.failures.items()},
        "curve": steps,
    }


def seconds_of_a_step(images: Tensor, k: int, grid: tuple[int, int], stride_px: int, steps: int = 5) -> float:
    """Of fitting images together, once warm; of the processor, where images are on it."""
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
    """Seconds of the processor for one step of one image [1, 3, H, W] as FeatUp takes it, with random targets."""
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
    """One view of one image's maps [1, c, H, W], downsampled: [1, c, h, w]. Padding, enlarging, unfolding for real."""
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


def pooled_error(high: Tensor, jitters: Sequence[Jitter], targets: Tensor) -> list[float]:
    """Relative squared error of views of features [N, k, H, W], pooled by a Gaussian, for targets [N, V, k, h, w]."""
    wrong = torch.zeros(len(high))
    matrices = view_matrices(jitters, (high.shape[2], high.shape[3]))
    pools = [_gaussian(cells, length) for cells, length in zip(targets.shape[3:], high.shape[2:], strict=True)]
    for view, (down, across) in enumerate(zip(*matrices, strict=True)):
        both = [(pool @ axis).float()[None] for pool, axis in zip(pools, (down, across), strict=True)]
        low = apply_matrices(high, *(matrix.expand(len(high), -1, -1).to(high) for matrix in both))
        wrong += (low - targets[:, view]).square().sum((1, 2, 3)).cpu()
    return (wrong / targets.square().sum((1, 2, 3, 4)).cpu()).tolist()


def _gaussian(cells: int, length: int) -> Tensor:
    """[cells, length] float64, rows sum to 1."""
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * length / cells
    distances = torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]
    return (-distances.square() / (2 * _SIGMA_PX**2)).softmax(1)


def _seen(backbone: Backbone, images: Tensor, jitters: list[Jitter], basis: tuple[Tensor, Tensor]) -> Tensor:
    parts = [jitters[first : first + 64] for first in range(0, len(jitters), 64)]
    return torch.cat([view_features(backbone, images, JitterMatrices.of(p, images.device), basis) for p in parts], 1)


def main() -> None:
    """A step's seconds, one thread: FeatUp's way, this one, and this one for four images."""
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)
    jitters = sample_views(Schedule(views=10), (224, 224))[0]
    row: dict[str, Any] = {"threads": 1, **rows.measured_on()}
    for k in (64, 128):
        plain_step(images[:1], k, (16, 16), 29, jitters)
        row[f"k={k}"] = {
            "plain": plain_step(images[:1], k, (16, 16), 29, jitters),
            "one": seconds_of_a_step(images[:1], k, (16, 16), 14),
            "four": seconds_of_a_step(images, k, (16, 16), 14),
        }
    rows.append("implicit_featup", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
