"""Claim: which layers of a backbone serve dense tasks best: the linear probe of `benchmarks.upsamplers.probe` by layer.

    python -m benchmarks.features.layers

Features are interpolated bilinearly to 224 pixels, k = 64 components. Differences are to the default layer.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from benchmarks import rows
from benchmarks.upsamplers.held_out import SHARED, SIZE, K, fitted_basis
from benchmarks.upsamplers.probe import High, draws_of, evaluated, labelled, trained, with_frequent_classes
from pipeline.evaluate.bootstrap import paired
from pipeline.evaluate.probe import mean_iou, share
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.upsamplers.build import build_upsampler

WEIGHTS = SHARED / "weights"
# timm model, its weights, and layers to compare; the first is the default.
CASES: dict[str, tuple[str, str, list[tuple[int, ...]]]] = {
    "lite0": (
        "tf_efficientnet_lite0",
        "tf_efficientnet_lite0.safetensors",
        [(3, 4), (2,), (3,), (4,), (2, 3, 4)],
    ),
    "vit-ti": (
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224.safetensors",
        [(11,), (7,), (8,), (9,), (10,), (8, 9, 10, 11)],
    ),
    "vit": (
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_dinov2.focus.safetensors",
        [(11,), (7,), (8,), (9,), (10,), (8, 9, 10, 11)],
    ),
}


def upsampled(backbone: Backbone) -> High:
    """Photographs to features [1, K, H, W]."""
    mean, components = fitted_basis(backbone, torch.device("cpu"))
    stage = build_upsampler("bilinear", None, backbone).with_basis(mean, components)
    return lambda photo: stage(backbone(photo), photo, SIZE)


def main(photos_each: int = 100, runs: int = 10, backbones: Sequence[str] = tuple(CASES)) -> None:
    """Measure.

    Args:
        photos_each: number of photographs of the training and of the validation part, each.
        runs: classifiers of each layer.
        backbones: names in `CASES`.
    """
    torch.set_num_threads(1)
    with torch.inference_mode():
        photos = (labelled(part, photos_each, torch.device("cpu")) for part in ("train", "val"))
        train, val = with_frequent_classes(*photos)
        draws = draws_of(runs, photos_each)
        for case in backbones:
            name, weights, layers = CASES[case]
            counts = {}
            for layer in layers:
                backbone = build_backbone(name, size=SIZE, weights=str(WEIGHTS / weights), layer=layer)
                high = upsampled(backbone)
                counts[layer] = evaluated(high, trained(high, train, draws), val)
                print(case, layer, f"{mean_iou(counts[layer][0].double().sum(1)).mean():.4f}", flush=True)
            write(case, {"photos": photos_each, "runs": runs, "k": K}, counts, layers[0])


def write(
    case: str,
    setting: dict[str, int],
    counts: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]],
    default: tuple[int, ...],
) -> None:
    """One row a layer: mean IoU and accuracy near borders with their intervals, and differences to the default's."""
    confusion, border = ({_name(layer): count[part] for layer, count in counts.items()} for part in range(2))
    miou = paired(confusion, mean_iou, _name(default))
    near_borders = paired(border, share, _name(default))
    for layer in miou:
        row: dict[str, Any] = {"backbone": case, "layer": layer, **setting}
        for metric, (value, difference) in (("miou", miou[layer]), ("border_accuracy", near_borders[layer])):
            row |= {metric: value.row(), f"{metric}_difference": difference.row()}
        rows.append("layers", {**row, **rows.measured_on()})
        print(json.dumps(row), flush=True)


def _name(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


if __name__ == "__main__":
    tyro.cli(main)
