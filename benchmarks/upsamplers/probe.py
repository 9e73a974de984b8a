"""How useful features are for training: a linear segmentation probe, overall and at borders.

A linear classifier of the 20 most frequent classes is trained on sampled pixels of coco200's training half and
evaluated on all pixels of the validation half: mean IoU, accuracy, and accuracy within 3 pixels of a border between
classes, where upsamplers differ. Each run trains on its own draw, with replacement, of the training photographs and of
their pixels, the same for all sides. Intervals and paired differences also resample the evaluation photographs.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.upsamplers.held_out import COCO, SIZE
from pipeline.images.decoding.decode import Geometry, decode

CLASSES, BORDER_PX, PIXELS_OF_A_PHOTO, WEIGHT_DECAY = 20, 3, 1000, 1e-3
Photo = tuple[Tensor, Tensor]  # [1, 3, H, W] uint8, and classes [H, W], -1 for ignored pixels
High = Callable[[Tensor], Tensor]  # photograph -> features [1, k, H, W] float16


def labelled(part: str, count: int, device: torch.device, size: tuple[int, int] = SIZE) -> list[Photo]:
    """Photographs, spread evenly over a part of coco200, and their masks on the same pixels."""
    files = sorted((COCO / part).glob("*.jpg"))
    geometry, photos = Geometry(size, "crop", size), []
    for path in (files[i * len(files) // count] for i in range(count)):
        decoded = decode(path.read_bytes(), geometry)
        mask = np.array(Image.open(COCO.parent / "masks" / part / f"{path.stem}.png"))
        scale_x, _, x0, _, scale_y, y0 = decoded.affine
        columns = ((np.arange(size[1]) + 0.5 - x0) / scale_x).astype(int).clip(0, mask.shape[1] - 1)
        lines = ((np.arange(size[0]) + 0.5 - y0) / scale_y).astype(int).clip(0, mask.shape[0] - 1)
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

    def __init__(self, runs: int, photos: int, size: tuple[int, int] = SIZE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.photos = torch.randint(photos, (runs, photos), generator=generator)
        self.pixels = torch.randint(size[0] * size[1], (runs, photos, PIXELS_OF_A_PHOTO), generator=generator)


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
