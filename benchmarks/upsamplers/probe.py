"""Claim: how useful upsampled features are for training: a linear segmentation probe, overall and at borders.

    python -m benchmarks.upsamplers.probe --photos-each 50

A linear classifier of the 20 most frequent classes, on k = 64 components at 224 pixels, is trained on sampled pixels of
coco200's training half and evaluated on all pixels of the validation half: mean IoU, accuracy, and accuracy within 3
pixels of a border between classes, where upsamplers differ.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from benchmarks import rows
from benchmarks.upsamplers.held_out import BACKBONES, COCO, SIZE, K, build, fitted_basis, pooling_file
from pipeline.images.decoding.decode import Geometry, decode
from pipeline.run.feature_worker import pick_device
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.interface import Projected

CLASSES, BORDER_PX, PIXELS_OF_A_PHOTO, WEIGHT_DECAY = 20, 3, 3000, 1e-3
Photo = tuple[Tensor, Tensor]  # [1, 3, H, W] uint8, and classes [H, W], -1 for ignored pixels


def labelled(part: str, count: int, device: torch.device) -> list[Photo]:
    """Photographs, spread evenly over a part of coco200, and their masks on the same pixels."""
    files = sorted((COCO / part).glob("*.jpg"))
    geometry, photos = Geometry(SIZE, "crop", SIZE), []
    for path in (files[i * len(files) // count] for i in range(count)):
        decoded = decode(path.read_bytes(), geometry)
        mask = np.array(Image.open(COCO.parent / "masks" / part / f"{path.stem}.png"))
        scale_x, _, x0, _, scale_y, y0 = decoded.affine
        columns = ((np.arange(SIZE[1]) + 0.5 - x0) / scale_x).astype(int).clip(0, mask.shape[1] - 1)
        lines = ((np.arange(SIZE[0]) + 0.5 - y0) / scale_y).astype(int).clip(0, mask.shape[0] - 1)
        classes = torch.from_numpy(mask[lines][:, columns].astype(np.int64)).to(device)
        photos.append((torch.tensor(decoded.pixels, device=device)[None], classes))
    return photos


def with_frequent_classes(train: list[Photo], val: list[Photo]) -> tuple[list[Photo], list[Photo]]:
    counts = torch.bincount(torch.cat([classes.flatten() for _, classes in train]), minlength=256)
    counts[0] = 0  # unlabelled
    numbers = torch.full((256,), -1, device=counts.device)
    numbers[counts.argsort(descending=True)[:CLASSES]] = torch.arange(CLASSES, device=counts.device)
    renumbered = [[(photo, numbers[classes]) for photo, classes in photos] for photos in (train, val)]
    return renumbered[0], renumbered[1]


def near_borders(classes: Tensor) -> Tensor:
    """Pixels near borders between classes: [H, W] bool."""
    edges = torch.zeros_like(classes, dtype=torch.float)
    for axis in range(2):
        change = (classes.diff(dim=axis) != 0).float()
        before, after = ((0, 0, 0, 1), (0, 0, 1, 0)) if axis == 0 else ((0, 1), (1, 0))
        edges = torch.maximum(edges, torch.maximum(F.pad(change, before), F.pad(change, after)))
    return F.max_pool2d(edges[None], 2 * BORDER_PX - 1, 1, BORDER_PX - 1)[0] > 0


def pixels_of(features: Tensor) -> Tensor:
    """[1, k, H, W] -> [H·W, k]."""
    return features[0].flatten(1).T.float()


def probe(high: Callable[[Tensor], Tensor], train: list[Photo], val: list[Photo]) -> dict[str, float]:
    """Train and evaluate a classifier on the features that ``high`` computes from photographs."""
    generator, inputs, targets = torch.Generator().manual_seed(0), [], []
    for photo, classes in train:
        chosen = torch.randperm(classes.numel(), generator=generator)[:PIXELS_OF_A_PHOTO].to(classes.device)
        chosen = chosen[classes.flatten()[chosen] >= 0]
        inputs.append(pixels_of(high(photo))[chosen])
        targets.append(classes.flatten()[chosen])
    x, y = torch.cat(inputs), torch.cat(targets)
    mean, deviation = x.mean(0), x.std(0)
    with torch.inference_mode(False), torch.enable_grad():
        classifier = fit_classifier(((x - mean) / deviation).clone(), y.clone())
    confusion, border = torch.zeros(CLASSES, CLASSES), torch.zeros(2)
    for photo, classes in val:
        predicted = classifier((pixels_of(high(photo)) - mean) / deviation).argmax(1).view_as(classes)
        known = classes >= 0
        pairs = classes[known] * CLASSES + predicted[known]
        confusion += torch.bincount(pairs, minlength=CLASSES**2).view_as(confusion).cpu()
        edge = known & near_borders(classes)
        border += torch.stack([(predicted == classes)[edge].sum(), edge.sum()]).cpu()
    correct = confusion.diag()
    iou = (correct / (confusion.sum(0) + confusion.sum(1) - correct))[confusion.sum(1) > 0]
    return {
        "miou": round(iou.mean().item(), 4),
        "accuracy": round((correct.sum() / confusion.sum()).item(), 4),
        "border_accuracy": round((border[0] / border[1]).item(), 4),
    }


def fit_classifier(x: Tensor, y: Tensor) -> torch.nn.Linear:
    """Fit to convergence, without randomness."""
    classifier = torch.nn.Linear(x.shape[1], CLASSES).to(x.device)
    torch.nn.init.zeros_(classifier.weight)
    torch.nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(classifier(x), y) + WEIGHT_DECAY * classifier.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return classifier.requires_grad_(False)


def methods(name: str, folder: Path, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> photograph [1, 3, H, W] to features [1, k, H, W] float16, each computed once."""
    backbone = build(name, device)
    basis = fitted_basis(backbone, device)
    stages = {
        "bilinear": build_upsampler("bilinear", None, backbone),
        "jbu, universal": build_upsampler("jbu", "universal", backbone),
        "jbu": build_upsampler("jbu", None, backbone),
        "multiview": build_upsampler("multiview", pooling_file(folder, name, device.type), backbone),
    }

    def high(stage: Projected) -> Callable[[Tensor], Tensor]:
        return lambda photo: stage(backbone(photo), photo, SIZE)

    return {method: high(stage.to(device).with_basis(*basis).to(device)) for method, stage in stages.items()}


def main(
    photos_each: int = 50,
    backbones: tuple[str, ...] = tuple(BACKBONES),
    folder: Path = Path("pooling_models"),
    device: str = "auto",
) -> None:
    """Measure.

    Args:
        photos_each: number of photographs of the training and of the validation part, each.
        backbones: "lite0" and "vit".
        folder: folder of the pooling models.
        device: "auto", "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    chosen = torch.device(pick_device(device))
    with torch.inference_mode():
        photos = (labelled(part, photos_each, chosen) for part in ("train", "val"))
        train, val = with_frequent_classes(*photos)
        for name in backbones:
            for method, high in methods(name, folder, chosen).items():
                row: dict[str, Any] = {"backbone": name, "method": method, "photos": photos_each, "k": K}
                row |= probe(high, train, val)
                rows.append("probe", {**row, **rows.measured_on()})
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
