"""Claim: multiview on a GPU takes little more than its passes of the backbone, which are bound by arithmetic.

    python -m benchmarks.upsamplers.multiview

Images per second of a batch from pixels to int8 codes: ViT-S/14 at 224 pixels, k = 64, on random pixels, random weights
(neither affects the time). Seconds of the passes alone, and of the whole. The floor counts the arithmetic of the passes
at the bf16 rate of an H100, that of the solver's products at its float32 rate, and the bytes of the solver's vectors at
its bandwidth.
"""

import json
from functools import partial

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rows
from benchmarks.timing import median_ms
from kernels.quantization import Encoding
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.run.feature_worker import pick_device
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.multiview.fitting import DEFAULT_STRIDE_PX
from pipeline.upsamplers.multiview.views import solver_grid, solver_views
from pipeline.views.features import JitterMatrices, view_features
from schemas.upsamplers import MultiviewOptions

SIZE, K, BACKBONE = (224, 224), 64, "vit_small_patch14_dinov2.lvd142m"
BF16_FLOPS, FLOAT32_FLOPS, BYTES_S = 989e12, 67e12, 3.35e12  # NVIDIA's data sheet of the H100 SXM, dense
VECTORS = 12  # reads and writes of a vector of the conjugate gradient in one iteration, if each operation is one pass


def floor(backbone: Backbone, views: int, iterations: int) -> dict[str, float]:
    """Least seconds an image on an H100."""
    counter = FlopCounterMode(display=False)
    with counter:
        backbone(torch.zeros(1, 3, *SIZE, dtype=torch.uint8, device=backbone.get_buffer("mean").device))
    (H, W), (h, w) = solver_grid(SIZE, DEFAULT_STRIDE_PX), backbone.grid
    products = 2 * views * h * K * W * (H + w)
    return {
        "passes": views * counter.get_total_flops() / BF16_FLOPS,
        "products": 2 * (iterations + 1) * products / FLOAT32_FLOPS,
        "vectors": VECTORS * iterations * K * H * W * 4 / BYTES_S,
    }


def measure(backbone: Backbone, views: int, batch: int) -> dict[str, object]:
    device = backbone.get_buffer("mean").device
    upsampler = build_upsampler("multiview", None, backbone, MultiviewOptions(views=views))
    fitting = upsampler.fitting()
    assert fitting is not None
    fit = fitting.usual(K)
    basis = (torch.zeros(backbone.num_chs, device=device), torch.eye(K, backbone.num_chs, device=device))
    stage = upsampler.fitted(fit).with_basis(*basis).to(device)
    encoding = Encoding.of_steps(np.full(K, 0.1, np.float32), device)
    images = torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8, device=device)
    matrices = JitterMatrices.of(solver_views(SIZE, views)[1:], device)
    sides = {
        "passes": partial(view_features, backbone, images, matrices, basis),
        "whole": lambda: stage.encode(backbone(images), images, SIZE, encoding),
    }
    ms = median_ms(sides, device.type)
    least = floor(backbone, views, fit.settings["iterations"])
    return {
        "views": views,
        "batch": batch,
        "images_per_s": round(1000 * batch / ms["whole"], 1),
        "ms": {name: round(value / batch, 4) for name, value in ms.items()},
        "floor_ms": {name: round(1000 * value, 4) for name, value in least.items()},
    }


def main(views: tuple[int, ...] = (5, 9, 21), batches: tuple[int, ...] = (8, 32, 64), device: str = "auto") -> None:
    """Measure; a row for each number of views and size of a batch."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        backbone = build_backbone(BACKBONE, size=SIZE, weights="random", layer=10).to(pick_device(device))
        for count in views:
            for batch in batches:
                row = {"backbone": BACKBONE, "k": K, **measure(backbone, count, batch), **rows.measured_on()}
                rows.append("multiview", row)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
