"""Claim: fitting each image's features to many views of it is practical for whole datasets.

    python -m benchmarks.upsamplers.implicit --photos-each 30

Photographs of coco200's validation part, two pretrained backbones, 224 pixels, k = 64 components of a basis fitted on
training photographs. The held-out error is ``|A Y + b - F|² / |F - mean F|²`` over 20 views that no fit used, where Y
are the upsampled features at 224 pixels, F the backbone's features of the view, A the pooling model's operator for the
view, and b its bias, for methods that subtract it. Seconds are measured separately for the fit and for the backbone's
passes.

Pooling models, fitted once per backbone (jobs/fit_pooling.py, on training photographs), are kept in --folder.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.timing import peak_bytes
from benchmarks.upsamplers.held_out import BACKBONES, SIZE, Judge, K, build, fitted_basis, photos, pooling_file
from pipeline.features.backbone import Backbone
from pipeline.run.feature_worker import pick_device
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.interface import Projected
from pipeline.upsamplers.multiview import upsampler as upsample_multiview
from pipeline.upsamplers.multiview.pooling import PoolingModel
from pipeline.views.features import view_features
from schemas.upsamplers import MultiviewOptions

VIEWS = (9, 21, 41)


class Clock:
    """Seconds of calls and of the backbone's passes; on a CPU process time, which other processes do not affect."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.passes = device, 0.0

    def timed(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        start = self._now()
        result = function(*arguments)
        return result, self._now() - start

    def view_features(self, *arguments: Any) -> Tensor:
        """Call `pipeline.views.features.view_features` and add its time to ``passes``."""
        features: Tensor
        features, seconds = self.timed(view_features, *arguments)
        self.passes += seconds
        return features

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def methods(backbone: Backbone, weights: str, basis: tuple[Tensor, Tensor]) -> dict[str, tuple[int, bool, Projected]]:
    """Name -> number of views, whether the bias is subtracted, and the upsampler with the basis."""
    device, result = basis[0].device, {}
    for name in ("bilinear", "jbu"):
        stage = build_upsampler(name, None, backbone).to(device).with_basis(*basis).to(device)
        result[name], result[f"{name}, less the bias"] = (1, False, stage), (1, True, stage)
    for views in VIEWS:
        upsampler = build_upsampler("multiview", weights, backbone, MultiviewOptions(views=views)).to(device)
        result[f"multiview, {views} views"] = views, True, upsampler.with_basis(*basis).to(device)
    return result


def measure(name: str, count: int, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    backbone = build(name, device)
    weights = pooling_file(folder, name, device.type)
    pooling = PoolingModel.read(weights)
    basis = fitted_basis(backbone, device)
    judge, images = Judge.of(backbone, pooling, basis), photos("val", count, device)
    seen = [judge.seen(photo) for photo in images]
    clock = Clock(device)
    upsample_multiview.view_features = clock.view_features
    results: list[dict[str, Any]] = []
    for method, (views, with_bias, stage) in methods(backbone, weights, basis).items():
        judged, seconds, passes = [], [], []
        for photo, target in zip(images, seen, strict=True):
            features = backbone(photo)
            if views == 1 and with_bias:
                features = features - pooling.bias.to(device)
            clock.passes = 0.0
            high, total = clock.timed(stage, features, photo, SIZE)
            judged.append(judge.error(high, target, with_bias))
            seconds.append(total - clock.passes)
            passes.append(clock.passes)
        errors, cosines = zip(*judged, strict=True)
        results.append(
            {
                "backbone": name,
                "method": method,
                "photos": count,
                "held_out_error": round(statistics.mean(errors), 4),
                "errors": [round(error, 4) for error in errors],
                "cosine": round(statistics.mean(cosines), 4),
                "fit_s": round(statistics.median(seconds), 4),
                "extraction_s": round(statistics.median(passes), 4),
                "peak_bytes": peak_bytes(partial(stage, features, photo, SIZE), device.type),
                "settings": vars(pooling.settings) | {"views": views} if views > 1 else {},
            }
        )
    return results


def main(
    photos_each: int = 30,
    backbones: tuple[str, ...] = tuple(BACKBONES),
    folder: Path = Path("pooling_models"),
    device: str = "auto",
) -> None:
    """Measure.

    Args:
        photos_each: number of photographs of the validation part.
        backbones: "lite0" and "vit".
        folder: folder of the pooling models.
        device: "auto", "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    chosen = torch.device(pick_device(device))
    with torch.inference_mode():
        for name in backbones:
            for row in measure(name, photos_each, folder, chosen):
                rows.append("implicit", {**row, "k": K, "size": list(SIZE), "threads": 1, **rows.measured_on()})
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
