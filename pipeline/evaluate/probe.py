"""Linear probes: a classifier by L-BFGS, a regression in closed form, and the figures of segmentation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.sides import Side

__all__ = [
    "Draws",
    "Linear",
    "accuracy",
    "class_counts",
    "fit_classifier",
    "fit_regression",
    "mean_iou",
    "near_borders",
    "share",
    "training_pixels",
]

WEIGHT_DECAY = 1e-3
_MOST_STEPS = 60
_CONSTANT = 1e-6  # deviation of a component, as a share of the greatest, below which it holds nothing


@dataclass(frozen=True, eq=False)
class Linear:
    """An affine map of features: weight [outputs, k], bias [outputs], float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[n, k] -> [n, outputs]."""
        return F.linear(features, self.weight, self.bias)


class Draws:
    """Training images and pixels of each run: both with replacement, the same for all sides.

    Attributes:
        images: [R, P] int64, numbers of training images.
        places: [R, P, n] float64 in 0 … 1, places in the list of an image's labelled pixels.
    """

    def __init__(self, runs: int, images: int, pixels_of_an_image: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(images, (runs, images), generator=generator)
        self.places = torch.rand(runs, images, pixels_of_an_image, generator=generator, dtype=torch.float64)

    def pixels(self, image: int, labelled: Tensor) -> Tensor:
        """Chosen pixels [R, n] of an image, out of its labelled ones [l]; [R, 0] if it has none."""
        if not len(labelled):
            return labelled.new_empty(len(self.places), 0)
        return labelled[(self.places[:, image] * len(labelled)).long()]


def training_pixels(
    comparison: Comparison, side: Side, keys: Sequence[str], labels: Callable[[Grid, str], Tensor], draws: Draws
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [n, k] float32 and labels [n] of the drawn pixels, for each run. Each image is read once.

    Args:
        comparison: the sides.
        side: whose features are read.
        keys: of the training images.
        labels: of an image's grid, [m, n]; pixels where they are negative or NaN are not drawn.
        draws: images and pixels.
    """
    pools = []  # of each image: features [R, n, k] float16 and labels [R, n]
    for image, key in enumerate(keys):
        grid = comparison.grid(key)
        truth = labels(grid, key).flatten()
        chosen = draws.pixels(image, (truth >= 0).nonzero().flatten())
        pools.append((comparison.pixels(side, key, grid)[chosen].half(), truth[chosen]))
    for run, images in enumerate(draws.images.tolist()):
        x, y = (torch.cat([pools[image][part][run] for image in images]) for part in range(2))
        yield x.float(), y


def standardization(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [k] and deviation [k] of features [n, k]; 1 where they are constant."""
    mean, deviation = x.mean(0), x.std(0)
    return mean, torch.where(deviation > _CONSTANT * deviation.max(), deviation, 1.0)


def fit_classifier(x: Tensor, y: Tensor, classes: int) -> Linear:
    """Fit a linear classifier of standardized features, without randomness.

    It minimises mean cross-entropy plus `WEIGHT_DECAY` × the sum of squared weights by L-BFGS. Mean and deviation of
    the features are folded into the result.

    Args:
        x: [n, k] float32.
        y: [n] int64, 0 … classes − 1.
        classes: number of outputs.
    """
    mean, deviation = standardization(x)
    with torch.inference_mode(False), torch.enable_grad():
        scaled, truth = ((x - mean) / deviation).clone(), y.clone()
        weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=_MOST_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(scaled, weight, bias), truth) + WEIGHT_DECAY * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return _of_unscaled(weight.detach(), bias.detach(), mean, deviation)


def fit_regression(x: Tensor, y: Tensor) -> Linear:
    """Fit a linear regression of standardized features in closed form.

    It minimises the mean squared error plus `WEIGHT_DECAY` × the sum of squared weights.

    Args:
        x: [n, k] float32.
        y: [n] float64.
    """
    mean, deviation = standardization(x)
    scaled = (x - mean).double() / deviation.double()
    centred = y.double() - y.double().mean()
    gram = scaled.T @ scaled / len(x) + WEIGHT_DECAY * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    weight = torch.linalg.solve(gram, scaled.T @ centred / len(x))[None].float()
    bias = (y.double().mean() - (weight[0].double() @ scaled.mean(0))).float()[None]
    return _of_unscaled(weight, bias, mean, deviation)


def _of_unscaled(weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor) -> Linear:
    """The map of features before they are standardized."""
    unscaled = weight / deviation
    return Linear(unscaled, bias - unscaled @ mean)


def near_borders(classes: Tensor, width_px: int) -> Tensor:
    """Pixels within ``width_px`` of a border between classes [H, W]: [H, W] bool."""
    edges = torch.zeros_like(classes, dtype=torch.float)
    for axis in range(2):
        change = (classes.diff(dim=axis) != 0).float()
        before, after = ((0, 0, 0, 1), (0, 0, 1, 0)) if axis == 0 else ((0, 1), (1, 0))
        edges = torch.maximum(edges, torch.maximum(F.pad(change, before), F.pad(change, after)))
    return F.max_pool2d(edges[None], 2 * width_px - 1, 1, width_px - 1)[0] > 0


def class_counts(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts of pixels by class: [classes, 3] int64: predicted rightly, of the truth, predicted.

    Args:
        predicted: [n] int64, 0 … classes − 1.
        truth: [n] int64.
        classes: their number.
    """
    lists = (truth[predicted == truth], truth, predicted)
    return torch.stack([torch.bincount(one, minlength=classes) for one in lists], 1)


def mean_iou(counts: Tensor) -> Tensor:
    """Mean intersection over union of the classes that occur in the truth, of `class_counts` [N, classes, 3]: [N]."""
    right, truth, predicted = counts.unbind(2)
    return (right / (truth + predicted - right)).where(truth > 0, torch.nan).nanmean(1)


def accuracy(counts: Tensor) -> Tensor:
    """Share of the pixels that are predicted rightly, of `class_counts` [N, classes, 3]: [N]."""
    return counts[..., 0].sum(1) / counts[..., 1].sum(1)


def share(counts: Tensor) -> Tensor:
    """Hits divided by trials: [N, 2] -> [N]."""
    return counts[:, 0] / counts[:, 1]
