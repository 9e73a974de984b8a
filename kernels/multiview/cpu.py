"""The multiview solver on a CPU in float32: matrix products on bands, and single passes between them.

It solves for a few channels of an image at a time, so that all vectors of their conjugate gradient, and the values
between the two products of a view, stay in a core's cache. The layout is [H, channels, W], so that one product mixes
the rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.compilation import compiled
from kernels.dispatch import Kind, not_of_dtypes, not_on_cpu
from kernels.multiview.reference import edge_weights
from kernels.multiview.views import Solution, ViewMatrices

__all__ = ["reasons_not", "solve"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_CHANNELS = 8  # channels solved together
# Sums may be reordered (so that they vectorise), in the same way in each run; NaN and infinities keep their meaning.
_compiled = compiled(fastmath={"contract", "reassoc", "nsz", "arcp"})


def reasons_not(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why this implementation cannot take targets of these kinds; none if it can."""
    return [*not_on_cpu(kinds), *not_of_dtypes(kinds, (torch.float32,))]


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
    """As `kernels.multiview.solve`, which has checked the arguments; float32 on a CPU."""
    B, k = start.shape[:2]
    features = torch.empty_like(start, memory_format=torch.contiguous_format)
    objective, steps = np.zeros((B, k, 2)), np.zeros((B, k), np.int64)
    with _one_thread():
        operators = _Identity() if views is None else _Operators(views)
        for image in range(B):
            edges = _Edges.of(guidance[image], colour_sigma, regularisation)
            for first in range(0, k, _CHANNELS):
                group = slice(first, first + _CHANNELS)
                target = targets[image, :, group].transpose(1, 2).contiguous()  # [V, h, channels, w]
                # [H, channels, W]. Always a copy, even of one channel, where the transpose moves nothing.
                x = start[image, group].transpose(0, 1).clone(memory_format=torch.contiguous_format)
                objective[image, group], steps[image, group] = _conjugate_gradient(
                    target, operators, edges, x, iterations, tolerance
                )
                features[image, group] = x.transpose(0, 1)
    initial, final = torch.from_numpy(objective.sum(1)).unbind(1)
    return Solution(features, initial, final, torch.from_numpy(steps))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute matrix products in this thread only: their sums must not depend on the number of threads.

    A job computes several shards at once instead (`pipeline.run.feature_worker`), which also loses no time at barriers.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Operators:
    """The map to all views for a group of channels, and its adjoint, with reused scratch memory."""

    def __init__(self, views: ViewMatrices) -> None:
        self.views, self.bands = views, views.row_bands
        self.columns, self.columns_t = views.columns, views.columns.mT
        size = len(views) * views.low[0] * _CHANNELS * views.high[1]
        self._sorted, self._by_view = torch.empty(size), torch.empty(size)

    def project(self, x: Tensor) -> Tensor:
        """[H, channels, W] -> [V, h, channels, w]."""
        V, (h, w), W, channels = len(self.views), self.views.low, x.shape[2], x.shape[1]
        by_place, by_view = self._scratch(channels)
        flat = x.flatten(1)
        for rows, support, matrix in self.bands.bands:
            torch.mm(matrix, flat[slice(*support)], out=by_place[slice(*rows)])
        torch.index_select(by_place, 0, self.bands.place, out=by_view)
        return torch.bmm(by_view.view(V, h * channels, W), self.columns_t).view(V, h, channels, w)

    def back_project(self, seen: Tensor) -> Tensor:
        """[V, h, channels, w] -> [H, channels, W]."""
        V, h, channels, w = seen.shape
        H, W = self.views.high
        by_place, by_view = self._scratch(channels)
        torch.bmm(seen.view(V, h * channels, w), self.columns, out=by_view.view(V, h * channels, W))
        torch.index_select(by_view, 0, self.bands.order, out=by_place)
        x = torch.zeros(H, channels * W)
        for rows, support, matrix in self.bands.bands:
            x[slice(*support)].addmm_(matrix.mT, by_place[slice(*rows)])
        return x.view(H, channels, W)

    def _scratch(self, channels: int) -> tuple[Tensor, Tensor]:
        rows, columns = len(self.views) * self.views.low[0], channels * self.views.high[1]
        first, second = (buffer[: rows * columns].view(rows, columns) for buffer in (self._sorted, self._by_view))
        return first, second


class _Identity:
    """The map of features that are themselves the targets: [H, channels, W] -> [1, H, channels, W]."""

    def project(self, x: Tensor) -> Tensor:
        return x[None]

    def back_project(self, seen: Tensor) -> Tensor:
        return seen[0].clone()


class _Edges(NamedTuple):
    """Weights of the Laplacian times λ: [H, W] float32 to the four following neighbours, and each pixel's total."""

    right: Floats
    below: Floats
    below_right: Floats
    below_left: Floats
    degree: Floats

    @classmethod
    def of(cls, image: Tensor, colour_sigma: float, regularisation: float) -> "_Edges":
        weights = regularisation * edge_weights(image, colour_sigma)
        degree = weights.sum(0)
        degree[:, 1:] += weights[0, :, :-1]
        degree[1:] += weights[1, :-1]
        degree[1:, 1:] += weights[2, :-1, :-1]
        degree[1:, :-1] += weights[3, :-1, 1:]
        return cls(*(array.float().numpy() for array in (*weights, degree)))


def _conjugate_gradient(
    target: Tensor, operators: _Operators | _Identity, edges: _Edges, x: Tensor, iterations: int, tolerance: float
) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Solve for a group of channels in place in x; returns objectives before and after [channels, 2], and steps."""
    objective = np.empty((x.shape[1], 2))
    residual, smooth = target - operators.project(x), _smooth(x, edges)
    objective[:, 0] = _misfit(residual) + _products(x, smooth)
    r = operators.back_project(residual) - smooth
    p, rr = r.clone(), _products(r, r)
    enough, steps = rr * tolerance**2, np.zeros(len(rr), np.int64)
    for _ in range(iterations):
        q = operators.back_project(operators.project(p))
        _add_laplacian(p.numpy(), *edges, q.numpy())
        curvature = _products(p, q)
        going = (rr > enough) & (curvature > 0)
        if not going.any():
            break
        step = np.divide(rr, curvature, out=np.zeros_like(rr), where=going)
        before, rr = rr, np.empty_like(rr)
        _advance(x.numpy(), r.numpy(), p.numpy(), q.numpy(), step.astype(np.float32), rr)
        turn = np.divide(rr, before, out=np.zeros_like(rr), where=going)
        _turn(p.numpy(), r.numpy(), turn.astype(np.float32))
        steps += going
    objective[:, 1] = _misfit(target - operators.project(x)) + _products(x, _smooth(x, edges))
    return objective, steps


def _misfit(residual: Tensor) -> Doubles:
    """Squares of [V, h, channels, w], summed per channel in float64."""
    total: Doubles = residual.square().sum((1, 3)).sum(0, dtype=torch.float64).numpy()
    return total


def _smooth(x: Tensor, edges: _Edges) -> Tensor:
    output = torch.zeros_like(x)
    _add_laplacian(x.numpy(), *edges, output.numpy())
    return output


def _products(a: Tensor, b: Tensor) -> Doubles:
    """Dot product of each channel, [channels] float64."""
    output = np.empty(a.shape[1])
    _dot(a.numpy(), b.numpy(), output)
    return output


@_compiled
def _add_laplacian(
    x: Floats, right: Floats, below: Floats, below_right: Floats, below_left: Floats, degree: Floats, output: Floats
) -> None:
    """Add λ·L·x to the output, both [H, channels, W]."""
    H, channels, W = x.shape
    for y in range(H):
        for channel in range(channels):
            row, o = x[y, channel], output[y, channel]
            for i in range(W):
                o[i] += degree[y, i] * row[i]
            for i in range(W - 1):
                o[i] -= right[y, i] * row[i + 1]
            for i in range(1, W):
                o[i] -= right[y, i - 1] * row[i - 1]
            if y + 1 < H:
                row = x[y + 1, channel]
                for i in range(W):
                    o[i] -= below[y, i] * row[i]
                for i in range(W - 1):
                    o[i] -= below_right[y, i] * row[i + 1]
                for i in range(1, W):
                    o[i] -= below_left[y, i] * row[i - 1]
            if y > 0:
                row = x[y - 1, channel]
                for i in range(W):
                    o[i] -= below[y - 1, i] * row[i]
                for i in range(1, W):
                    o[i] -= below_right[y - 1, i - 1] * row[i - 1]
                for i in range(W - 1):
                    o[i] -= below_left[y - 1, i + 1] * row[i + 1]


@_compiled
def _dot(a: Floats, b: Floats, output: Doubles) -> None:
    H, channels, W = a.shape
    output[:] = 0
    for y in range(H):
        for channel in range(channels):
            total = np.float32(0)  # of one row; rows are summed in float64
            for i in range(W):
                total += a[y, channel, i] * b[y, channel, i]
            output[channel] += total


@_compiled
def _advance(x: Floats, r: Floats, p: Floats, q: Floats, step: Floats, squares: Doubles) -> None:
    """x += step·p and r -= step·q; squares gets the squares of r, summed per channel."""
    H, channels, W = x.shape
    squares[:] = 0
    for y in range(H):
        for channel in range(channels):
            total = np.float32(0)
            for i in range(W):
                x[y, channel, i] += step[channel] * p[y, channel, i]
                left = r[y, channel, i] - step[channel] * q[y, channel, i]
                r[y, channel, i] = left
                total += left * left
            squares[channel] += total


@_compiled
def _turn(p: Floats, r: Floats, turn: Floats) -> None:
    """Compute the next direction: p = r + turn·p."""
    H, channels, W = p.shape
    for y in range(H):
        for channel in range(channels):
            for i in range(W):
                p[y, channel, i] = r[y, channel, i] + turn[channel] * p[y, channel, i]
