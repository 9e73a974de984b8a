"""The multiview solver in plain torch, image by image: the definition, for any floating dtype on any device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.dispatch import Kind
from kernels.multiview.views import Solution, ViewMatrices

__all__ = ["OFFSETS", "edge_weights", "neighbours", "reasons_not", "solve"]

# Smaller weights are set to 0: float32 denormals in the Laplacian would cost many times its arithmetic.
_LEAST_EDGE = 1e-6
# (down, right) offsets to half of a pixel's neighbours, so that each edge is counted once.
OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, the reference takes all that the public op accepts."""
    return []


def solve(
    targets: Tensor,
    views: ViewMatrices | None,
    guidance: Tensor,
    start: Tensor,
    regularisation: float,
    iterations: int,
    colour_sigma: float,
    tolerance: float,
) -> Solution:
    """As `kernels.multiview.solve`, which has checked the arguments."""
    solved = []
    for target, image, begin in zip(targets, guidance, start, strict=True):
        weights = edge_weights(image, colour_sigma).to(target.dtype)
        solved.append(_conjugate_gradient(target, views, weights, begin, regularisation, iterations, tolerance))
    features, initial, final, steps = zip(*solved, strict=True)
    return Solution(torch.stack(features), torch.stack(initial), torch.stack(final), torch.stack(steps))


def edge_weights(image: Tensor, colour_sigma: float) -> Tensor:
    """Weights between neighbours: [4, H, W] float64, from each pixel to the right, below, below right, below left.

    Args:
        image: [3, H, W] floating, 0 … 1.
        colour_sigma: standard deviation of the Gaussian of colour distances.
    """
    image = image.double()
    weights = image.new_zeros(4, *image.shape[1:])
    for edges, (down, right) in zip(weights, OFFSETS, strict=True):
        here, there = neighbours(image.shape[1:], down, right)
        distance = (image[:, *here] - image[:, *there]).square().sum(0)
        similar = torch.exp(-distance / (2 * colour_sigma**2))
        edges[here] = torch.where(similar < _LEAST_EDGE, 0.0, similar) / (down * down + right * right)
    return weights


def neighbours(size: torch.Size, down: int, right: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of all pixels that have a neighbour at this offset, and slices of these neighbours."""
    H, W = size
    columns, others = slice(max(0, -right), W - max(0, right)), slice(max(0, right), W - max(0, -right))
    return (slice(0, H - down), columns), (slice(down, H), others)


def _laplacian(maps: Tensor, weights: Tensor) -> Tensor:
    """Half the gradient of ``Σ g_pq (X_p - X_q)²``: [k, H, W] -> the same."""
    output = torch.zeros_like(maps)
    for edges, (down, right) in zip(weights, OFFSETS, strict=True):
        here, there = neighbours(maps.shape[1:], down, right)
        flow = edges[here] * (maps[:, *here] - maps[:, *there])
        output[:, *here] += flow
        output[:, *there] -= flow
    return output


def _conjugate_gradient(
    target: Tensor,
    views: ViewMatrices | None,
    weights: Tensor,
    start: Tensor,
    regularisation: float,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve for one image; scalars are [k, 1, 1] float64, one problem per channel."""

    def smooth(x: Tensor) -> Tensor:
        return regularisation * _laplacian(x, weights)

    project, back_project = _operators(views)
    x = start.clone()
    residual, smoothness = target - project(x), smooth(x)
    initial = residual.double().square().sum() + _dot(x, smoothness).sum()
    r = back_project(residual) - smoothness
    p, rr = r, _dot(r, r)
    enough, steps = rr * tolerance**2, torch.zeros_like(rr, dtype=torch.int64)
    for _ in range(iterations):
        q = back_project(project(p)) + smooth(p)
        curvature = _dot(p, q)
        going = (rr > enough) & (curvature > 0)
        step = torch.where(going, rr / curvature, 0.0)
        x = x + step.to(x.dtype) * p
        r = r - step.to(x.dtype) * q
        before, rr = rr, _dot(r, r)
        p = r + torch.where(going, rr / before, 0.0).to(x.dtype) * p
        steps += going
    final = (target - project(x)).double().square().sum() + _dot(x, smooth(x)).sum()
    return x, initial, final, steps.flatten()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum((1, 2), keepdim=True)


def _operators(views: ViewMatrices | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The map from [k, H, W] to all views [V, k, h, w], and its adjoint: one product for rows, a batch for columns."""
    if views is None:
        return (lambda maps: maps[None]), (lambda seen: seen[0])
    V, (h, w), (H, W) = len(views), views.low, views.high
    rows, columns = views.rows.flatten(0, 1), views.columns

    def project(maps: Tensor) -> Tensor:
        k = len(maps)
        seen = rows @ maps.transpose(0, 1).reshape(H, k * W)  # [V h, k W]
        return (seen.view(V, h * k, W) @ columns.mT).view(V, h, k, w).transpose(1, 2)

    def back_project(seen: Tensor) -> Tensor:
        k = seen.shape[1]
        spread = seen.transpose(1, 2).reshape(V, h * k, w) @ columns  # [V, h k, W]
        return (rows.mT @ spread.view(V * h, k * W)).view(H, k, W).transpose(0, 1)

    return project, back_project
