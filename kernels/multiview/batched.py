"""The multiview solver for GPUs, in plain torch: all images of a group in the same matrix products.

The maps to the views are the same for all images, so a group of B images with k channels is one problem with B·k
channels; only the weights of the Laplacian belong to an image. The layout is [H, B·k, W], so that one product mixes the
rows of all channels. Nothing waits for the device.

Groups have a fixed size and the last one is filled up: libraries choose kernels by shape, and an image's result must
not depend on the number of images beside it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.dispatch import Kind
from kernels.multiview.reference import OFFSETS, edge_weights, neighbours
from kernels.multiview.views import Solution, ViewMatrices

__all__ = ["reasons_not", "solve"]

# Images in a group. With 64 channels on 112×112, a vector of the conjugate gradient takes 3.2 MB an image in float32.
_IMAGES = {"cpu": 1, "cuda": 8}


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Reasons why inputs of these kinds cannot be taken: none, this takes all that the public op accepts."""
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
    project, back_project = _operators(views)
    size, groups = _IMAGES[targets.device.type], []
    for first in range(0, len(targets), size):
        target, image, begin = (_filled(part[first : first + size], size) for part in (targets, guidance, start))
        smooth = _smoother(image, target.dtype, regularisation, colour_sigma)
        solved = _conjugate_gradient(
            _joined(target), _joined(begin), project, back_project, smooth, iterations, tolerance
        )
        groups.append(_split(solved, size))
    parts = (torch.cat(parts)[: len(targets)] for parts in zip(*groups, strict=True))
    return Solution(*parts)


def _filled(images: Tensor, size: int) -> Tensor:
    """Repeat the last image up to the size of a group."""
    missing = size - len(images)
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images


def _joined(maps: Tensor) -> Tensor:
    """[B, …, k, H, W] -> [H, B·k, W], with a dimension of views first, if there is one: [V, H, B·k, W]."""
    if maps.ndim == 4:
        return maps.permute(2, 0, 1, 3).contiguous().flatten(1, 2)
    return maps.permute(1, 3, 0, 2, 4).contiguous().flatten(2, 3)


def _split(solved: tuple[Tensor, Tensor, Tensor, Tensor], images: int) -> Solution:
    """Separate the images of a group again, and sum the objectives of each image's channels."""
    x, *by_channel = solved
    features = x.unflatten(1, (images, -1)).permute(1, 2, 0, 3).contiguous()
    initial, final, steps = (one.view(images, -1) for one in by_channel)
    return Solution(features, initial.sum(1), final.sum(1), steps)


def _conjugate_gradient(
    target: Tensor,
    start: Tensor,
    project: Callable[[Tensor], Tensor],
    back_project: Callable[[Tensor], Tensor],
    smooth: Callable[[Tensor], Tensor],
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve for all channels [H, N, W]; return it, the objectives before and after ([N] float64), and steps [N]."""
    x = start
    residual, smoothness = target - project(x), smooth(x)
    initial = _squares(residual) + _dot(x, smoothness)
    r = back_project(residual) - smoothness
    p, rr = r.clone(), _dot(r, r)
    enough, steps = rr * tolerance**2, torch.zeros_like(rr, dtype=torch.int64)
    for _ in range(iterations):
        q = back_project(project(p)).add_(smooth(p))
        curvature = _dot(p, q)
        going = (rr > enough) & (curvature > 0)
        step = torch.where(going, rr / curvature, 0.0).to(x.dtype)[:, None]
        x = torch.addcmul(x, p, step)
        r.addcmul_(q, step, value=-1)
        before, rr = rr, _dot(r, r)
        p.mul_(torch.where(going, rr / before, 0.0).to(x.dtype)[:, None]).add_(r)
        steps += going
    final = _squares(target - project(x)) + _dot(x, smooth(x))
    return x, initial, final, steps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product per channel of [H, N, W]: [N] float64; rows are summed in the vectors' own dtype."""
    return (a * b).sum(2).sum(0, dtype=torch.float64)


def _squares(seen: Tensor) -> Tensor:
    """Squares of [V, h, N, w], summed per channel: [N] float64."""
    return seen.square().sum(3).sum((0, 1), dtype=torch.float64)


def _operators(views: ViewMatrices | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The map from [H, N, W] to all views [V, h, N, w], and its adjoint."""
    if views is None:
        return (lambda maps: maps[None]), (lambda seen: seen[0].clone())
    V, (h, w), (H, W) = len(views), views.low, views.high
    rows, columns = views.rows.flatten(0, 1), views.columns
    rows_t, columns_t = rows.mT, columns.mT

    def project(maps: Tensor) -> Tensor:
        N = maps.shape[1]
        return ((rows @ maps.view(H, N * W)).view(V, h * N, W) @ columns_t).view(V, h, N, w)

    def back_project(seen: Tensor) -> Tensor:
        N = seen.shape[2]
        return (rows_t @ (seen.view(V, h * N, w) @ columns).view(V * h, N * W)).view(H, N, W)

    return project, back_project


def _smoother(
    images: Tensor, dtype: torch.dtype, regularisation: float, colour_sigma: float
) -> Callable[[Tensor], Tensor]:
    """The Laplacian of each image times λ, on [H, N, W]."""
    weights = torch.stack([regularisation * edge_weights(image, colour_sigma) for image in images], 2)  # [4, H, B, W]
    degree = weights.sum(0)
    slices = [neighbours(images.shape[2:], *offset) for offset in OFFSETS]
    for edges, (here, there) in zip(weights, slices, strict=True):
        _at(degree, there).add_(_at(edges, here))
    edges_of = [_at(edges, here)[:, :, None].to(dtype) for edges, (here, _) in zip(weights, slices, strict=True)]
    degree = degree[:, :, None].to(dtype)

    def smooth(maps: Tensor) -> Tensor:
        maps = maps.unflatten(1, (len(images), -1))  # [H, B, k, W]
        output = degree * maps
        for edges, (here, there) in zip(edges_of, slices, strict=True):
            _at(output, here).addcmul_(edges, _at(maps, there), value=-1)
            _at(output, there).addcmul_(edges, _at(maps, here), value=-1)
        return output.flatten(1, 2)

    return smooth


def _at(maps: Tensor, place: tuple[slice, slice]) -> Tensor:
    """A view of some rows and columns of [H, …, W]."""
    rows, columns = place
    return maps[rows][..., columns]
