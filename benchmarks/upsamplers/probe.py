"""Claim: how useful upsampled features are for training: a linear segmentation probe, overall and at borders.

    python -m benchmarks.upsamplers.probe

A linear classifier of the 20 most frequent classes, on k = 64 components at 224 pixels, is trained on sampled pixels of
coco200's training half and evaluated on all pixels of the validation half: mean IoU, accuracy, and accuracy within 3
pixels of a border between classes, where upsamplers differ. Each run trains on its own draw, with replacement, of the
training photographs and of their pixels, the same for all upsamplers. Intervals and paired differences to bilinear also
resample the evaluation photographs.
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
from benchmarks.bootstrap import Estimate, paired
from benchmarks.upsamplers.held_out import BACKBONES, COCO, SIZE, K, build, fitted_basis, pooling_file
from pipeline.images.decoding.decode import Geometry, decode
from pipeline.run.feature_worker import pick_device
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.interface import Projected

CLASSES, BORDER_PX, PIXELS_OF_A_PHOTO, WEIGHT_DECAY = 20, 3, 1000, 1e-3
BASELINE = "bilinear"
Photo = tuple[Tensor, Tensor]  # [1, 3, H, W] uint8, and classes [H, W], -1 for ignored pixels
High = Callable[[Tensor], Tensor]  # photograph -> features [1, k, H, W] float16


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


class Draws:
    """Training photographs and pixels of each run.

    Attributes:
        photos: [R, P], drawn with replacement from P training photographs.
        pixels: [R, P, n], places in a flattened photograph.
    """

    def __init__(self, runs: int, photos: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.photos = torch.randint(photos, (runs, photos), generator=generator)
        self.pixels = torch.randint(SIZE[0] * SIZE[1], (runs, photos, PIXELS_OF_A_PHOTO), generator=generator)


def trained(high: High, train: list[Photo], draws: Draws) -> list[torch.nn.Linear]:
    """One classifier of features [k] a run."""
    # All runs' pixels of a photograph are taken from one computation of its features.
    pools = [
        (pixels_of(high(photo))[places].half(), classes.flatten()[places])
        for (photo, classes), places in zip(train, draws.pixels.transpose(0, 1).to(train[0][0].device), strict=True)
    ]
    classifiers = []
    for run, chosen in enumerate(draws.photos.tolist()):
        x, y = (torch.cat([pools[photo][part][run] for photo in chosen]) for part in range(2))
        classifiers.append(standardized_classifier(x[y >= 0].float(), y[y >= 0]))
    return classifiers


def standardized_classifier(x: Tensor, y: Tensor) -> torch.nn.Linear:
    """Fit on standardized features, and fold mean and deviation into the weights."""
    mean, deviation = x.mean(0), x.std(0)
    with torch.inference_mode(False), torch.enable_grad():
        classifier = fit_classifier(((x - mean) / deviation).clone(), y.clone())
    classifier.weight /= deviation
    classifier.bias -= classifier.weight @ mean
    return classifier


def evaluated(high: High, classifiers: list[torch.nn.Linear], val: list[Photo]) -> tuple[Tensor, Tensor]:
    """Confusion [R, P, classes, classes] of R classifiers on P photographs; correct and all border pixels [R, P, 2]."""
    weights = torch.cat([classifier.weight for classifier in classifiers])
    biases = torch.cat([classifier.bias for classifier in classifiers])
    confusions, borders = [], []
    for photo, classes in val:
        known, edge = classes >= 0, near_borders(classes)
        scores = F.linear(pixels_of(high(photo))[known.flatten()], weights, biases)
        predicted = scores.unflatten(1, (len(classifiers), CLASSES)).argmax(2)
        truth, at_edge = classes[known], edge[known]
        pairs = truth[:, None] * CLASSES + predicted
        confusions.append(torch.stack([torch.bincount(own, minlength=CLASSES**2) for own in pairs.T]))
        correct = (predicted == truth[:, None])[at_edge].sum(0)
        borders.append(torch.stack([correct, torch.full_like(correct, int(at_edge.sum()))], 1))
    return torch.stack(confusions, 1).unflatten(2, (CLASSES, CLASSES)).cpu(), torch.stack(borders, 1).cpu()


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean over the classes that occur, of confusion [N, truth, predicted]: [N]."""
    correct = confusion.diagonal(dim1=1, dim2=2)
    truth = confusion.sum(2)
    iou = correct / (truth + confusion.sum(1) - correct)
    return iou.where(truth > 0, torch.nan).nanmean(1)


def accuracy(confusion: Tensor) -> Tensor:
    return confusion.diagonal(dim1=1, dim2=2).sum(1) / confusion.sum((1, 2))


def border_accuracy(border: Tensor) -> Tensor:
    return border[:, 0] / border[:, 1]


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


def methods(name: str, folder: Path, device: torch.device) -> dict[str, High]:
    """Name -> photograph [1, 3, H, W] to features [1, k, H, W]."""
    backbone = build(name, device)
    basis = fitted_basis(backbone, device)
    stages = {
        BASELINE: build_upsampler("bilinear", None, backbone),
        "jbu, universal": build_upsampler("jbu", "universal", backbone),
        "jbu": build_upsampler("jbu", None, backbone),
        "multiview": build_upsampler("multiview", pooling_file(folder, name, device.type), backbone),
    }

    def high(stage: Projected) -> High:
        return lambda photo: stage(backbone(photo), photo, SIZE)

    return {method: high(stage.to(device).with_basis(*basis).to(device)) for method, stage in stages.items()}


def main(
    photos_each: int = 100,
    runs: int = 20,
    backbones: tuple[str, ...] = tuple(BACKBONES),
    folder: Path = Path("pooling_models"),
    device: str = "auto",
) -> None:
    """Measure.

    Args:
        photos_each: number of photographs of the training and of the validation part, each.
        runs: classifiers of each upsampler.
        backbones: "lite0" and "vit".
        folder: folder of the pooling models.
        device: "auto", "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    chosen = torch.device(pick_device(device))
    with torch.inference_mode():
        photos = (labelled(part, photos_each, chosen) for part in ("train", "val"))
        train, val = with_frequent_classes(*photos)
        draws = Draws(runs, photos_each)
        for name in backbones:
            counts = {}
            for method, high in methods(name, folder, chosen).items():
                counts[method] = evaluated(high, trained(high, train, draws), val)
                print(name, method, f"{mean_iou(counts[method][0].double().sum(1)).mean():.4f}", flush=True)
            confusion, border = ({method: count[part] for method, count in counts.items()} for part in range(2))
            write(name, photos_each, runs, {
                "miou": paired(confusion, mean_iou, BASELINE),
                "accuracy": paired(confusion, accuracy, BASELINE),
                "border_accuracy": paired(border, border_accuracy, BASELINE),
            })  # fmt: skip


def write(backbone: str, photos: int, runs: int, estimates: dict[str, dict[str, tuple[Estimate, Estimate]]]) -> None:
    """One row a method: every metric with its interval, and its difference to bilinear."""
    for method in estimates["miou"]:
        row: dict[str, Any] = {"backbone": backbone, "method": method, "photos": photos, "runs": runs, "k": K}
        for metric, of_methods in estimates.items():
            value, difference = of_methods[method]
            row[metric] = value.row()
            row[f"{metric}_difference"] = difference.row()
        rows.append("probe", {**row, **rows.measured_on()})
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
