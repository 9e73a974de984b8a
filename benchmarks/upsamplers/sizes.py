"""Claim: multiview's model of a backbone carries over to another image size.

    python -m benchmarks.upsamplers.sizes

A model is fitted at one size with `jobs/fit_pooling.py`, on training photographs of coco200, and used at another size,
where its bias is interpolated. Beside it: a model fitted at that size. The error is that on held-out views
(`benchmarks.upsamplers.held_out`), of solutions that are not smoothed.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.upsamplers.held_out import BACKBONES, COCO, Judge, build, fitted_basis, fitted_to_photos, photos
from jobs.fit_pooling import fit as fit_pooling
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.interface import Upsampler
from pipeline.upsamplers.multiview.pooling import PoolingModel
from schemas.options import FitPoolingConfig
from schemas.upsamplers import MultiviewOptions

NOT_SMOOTHED = MultiviewOptions(smoothing=0.0)
Basis = tuple[Tensor, Tensor]


def error(upsampler: Upsampler, judge: Judge, images: list[Tensor], seen: list[Tensor], with_bias: bool) -> float:
    """The mean error over photographs."""
    stage = upsampler.with_basis(*judge.basis)
    size = judge.backbone.size
    highs = (stage(judge.backbone(photo), photo, size) for photo in images)
    return statistics.mean(judge.error(high, views, with_bias)[0] for high, views in zip(highs, seen, strict=True))


def measure(name: str, backbone: Backbone, weights: str, count: int) -> dict[str, float]:
    """Errors of the model in a file, of one fitted at this size, and of bilinear interpolation."""
    device = torch.device("cpu")
    basis = fitted_basis(backbone, device)
    images = photos("val", count, device, backbone.size)
    carried = build_upsampler("multiview", weights, backbone, NOT_SMOOTHED)
    model = PoolingModel.read(weights)
    bias = torch.einsum("chw,kc->khw", model.bias_on(backbone.grid), basis[1])
    judges = {"carried": Judge(backbone, model.settings.sigma_px, bias, basis)}
    fresh = build_upsampler("multiview", None, backbone, NOT_SMOOTHED)
    fit = fitted_to_photos(fresh, basis, backbone.size)
    judges["fitted"] = Judge(backbone, fit.settings["sigma_px"], torch.tensor(fit.arrays["bias"]), basis)
    seen = [judges["fitted"].seen(photo) for photo in images]
    bilinear = build_upsampler("bilinear", None, backbone)
    return {
        "carried": error(carried, judges["carried"], images, seen, True),
        "fitted": error(fresh.fitted(fit), judges["fitted"], images, seen, True),
        "bilinear": error(bilinear, judges["fitted"], images, seen, False),
    }


def main(
    backbones: tuple[str, ...] = ("lite0", "vit-ti"), fitted_at: int = 224, used_at: int = 448, count: int = 8
) -> None:
    """Measure.

    Args:
        backbones: names in `held_out.BACKBONES`.
        fitted_at: side of the images in pixels that the model is fitted on.
        used_at: side of the images in pixels that it is used on.
        count: number of photographs.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in backbones:
            file = Path(folder) / f"{name}.safetensors"
            config = FitPoolingConfig(
                images=str(COCO / "train"), output=str(file), device="cpu", size=str(fitted_at), **BACKBONES[name]
            )
            fit_pooling(config)
            with torch.inference_mode():
                errors = measure(name, build(name, torch.device("cpu"), (used_at, used_at)), str(file), count)
            row = {"backbone": name, "fitted_at": fitted_at, "used_at": used_at, "photos": count}
            row |= {method: round(value, 4) for method, value in errors.items()}
            rows.append("sizes", {**row, **rows.measured_on()})
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
