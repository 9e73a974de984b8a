"""How useful features are for training: a linear segmentation probe, overall and at borders.

The probe of `pipeline.evaluate`, on features that are computed here instead of read from a store: a linear classifier
of the 20 most frequent classes is trained on sampled pixels of coco200's training half and evaluated on all pixels of
the validation half. Each run trains on its own draw, with replacement, of the training photographs and of their pixels,
the same for all sides. Intervals and paired differences also resample the evaluation photographs.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.upsamplers.held_out import COCO, SIZE
from densefeat.align import RowGeometry, align
from pipeline.evaluate.probe import Draws, Linear, class_counts, fit_classifier, near_borders
from pipeline.images.decoding.decode import Geometry, decode

CLASSES, BORDER_PX, PIXELS_OF_A_PHOTO = 20, 3, 1000
Photo = tuple[Tensor, Tensor]  # [1, 3, H, W] uint8, and classes [H, W], -1 for ignored pixels
High = Callable[[Tensor], Tensor]  # photograph -> features [1, k, H, W] float16


def labelled(part: str, count: int, device: torch.device, size: tuple[int, int] = SIZE) -> list[Photo]:
    """Photographs, spread evenly over a part of coco200, and their masks on the same pixels."""
    files = sorted((COCO / part).glob("*.jpg"))
    geometry, photos = Geometry(size, "crop", size), []
    for path in (files[i * len(files) // count] for i in range(count)):
        decoded = decode(path.read_bytes(), geometry)
        mask = np.array(Image.open(COCO.parent / "masks" / part / f"{path.stem}.png"))
        record = {name: getattr(decoded, name) for name in ("height", "width", "affine", "valid_box")}
        classes = torch.from_numpy(align(mask, RowGeometry.from_record(record, size))).to(device)
        photos.append((torch.tensor(decoded.pixels, device=device)[None], classes))
    return photos


def with_frequent_classes(train: list[Photo], val: list[Photo]) -> tuple[list[Photo], list[Photo]]:
    counts = torch.bincount(torch.cat([classes.flatten() for _, classes in train]), minlength=256)
    counts[0] = 0  # unlabelled
    numbers = torch.full((256,), -1, device=counts.device)
    numbers[counts.argsort(descending=True)[:CLASSES]] = torch.arange(CLASSES, device=counts.device)
    renumbered = [[(photo, numbers[classes]) for photo, classes in photos] for photos in (train, val)]
    return renumbered[0], renumbered[1]


def draws_of(runs: int, photos: int) -> Draws:
    """Training photographs and pixels of each run."""
    return Draws(runs, photos, PIXELS_OF_A_PHOTO, seed=0)


def pixels_of(features: Tensor) -> Tensor:
    """[1, k, H, W] -> [H·W, k]."""
    return features[0].flatten(1).T.float()


def trained(high: High, train: list[Photo], draws: Draws) -> list[Linear]:
    """One classifier of features [k] a run."""
    # All runs' pixels of a photograph are taken from one computation of its features.
    pools = []
    for number, (photo, classes) in enumerate(train):
        places = draws.pixels(number, (classes >= 0).flatten().nonzero().flatten().cpu()).to(classes.device)
        pools.append((pixels_of(high(photo))[places].half(), classes.flatten()[places]))
    classifiers = []
    for run, chosen in enumerate(draws.images.tolist()):
        x, y = (torch.cat([pools[photo][part][run] for photo in chosen]) for part in range(2))
        classifiers.append(fit_classifier(x.float(), y, CLASSES))
    return classifiers


def evaluated(high: High, classifiers: list[Linear], val: list[Photo]) -> tuple[Tensor, Tensor]:
    """`class_counts` [R, P, classes, 3] of R classifiers on P photographs; right and all border pixels [R, P, 2]."""
    counts, borders = [], []
    for photo, classes in val:
        known, edge = classes >= 0, near_borders(classes, BORDER_PX)
        pixels = pixels_of(high(photo))[known.flatten()]
        truth, at_edge = classes[known], edge[known]
        predicted = [classifier(pixels).argmax(1) for classifier in classifiers]
        counts.append(torch.stack([class_counts(one, truth, CLASSES) for one in predicted]))
        right = torch.stack([(one == truth)[at_edge].sum() for one in predicted])
        borders.append(torch.stack([right, at_edge.sum().expand_as(right)], 1))
    return torch.stack(counts, 1).cpu(), torch.stack(borders, 1).cpu()
