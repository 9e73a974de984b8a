"""High-res features from many views of an image: the public operation, which checks arguments and runs a solver.

A direct solver for FeatUp's objective (arXiv 2403.10516, equation 1: multi-view consistency). With a separable pooling
kernel, each jittered view is exactly ``R_t X C_tᵀ``. The features are then the solution of a linear least-squares
problem, and conjugate gradient on it consists of matrix products. `kernels.multiview.reference` is the definition.
"""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import Choice, Kind
from kernels.multiview.views import Solution, ViewMatrices

__all__ = ["explain", "smooth", "solve"]


@torch.no_grad()
def solve(
    targets: Tensor,
    views: ViewMatrices,
    guidance: Tensor,
    start: Tensor,
    *,
    regularisation: float,
    iterations: int,
    colour_sigma: float = 0.05,
    tolerance: float = 1e-5,
    implementation: str | None = None,
) -> Solution:
    """Minimise ``Σ_t |R_t X C_tᵀ - Y_t|² + regularisation · Σ_pq g_pq (X_p - X_q)²`` by conjugate gradient.

    p and q are 8-connected neighbours, and ``g_pq = exp(-|I_p - I_q|² / (2 colour_sigma²)) / |p - q|²``: features may
    change where the image does. Every channel of every image is a separate problem: results depend neither on the batch
    nor on the number of threads, and are bit-identical on one kind of device.

    Early stopping also regularises: with a small ``regularisation``, more iterations may be worse.

    Args:
        targets: [B, V, k, h, w] floating, not empty: features of the views.
        views: V views, (h, w) from (H, W), in the targets' dtype and on their device.
        guidance: [B, 3, H, W] floating, on the same device: the image on the grid of the solution, values 0 … 1.
        start: [B, k, H, W], dtype and device of the targets: initial solution.
        regularisation: λ, at least 0, finite.
        iterations: maximum number of steps, at least 1.
        colour_sigma: colour distance (RGB, 0 … 1) beyond which neighbours are no longer coupled; positive.
        tolerance: a channel stops when the norm of its gradient has fallen to this share of its initial value.
        implementation: "cpu" (float32 on a CPU) or "reference" (any); None picks the first that can
            (`kernels.dispatch`).

    Returns:
        The solution; values that are not finite affect only their own image (and channel).

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    _check(targets, views, guidance, start)
    return _solved(targets, views, guidance, start, regularisation, iterations, colour_sigma, tolerance, implementation)


@torch.no_grad()
def smooth(
    features: Tensor,
    guidance: Tensor,
    *,
    strength: float,
    iterations: int = 20,
    colour_sigma: float = 0.05,
    tolerance: float = 1e-5,
    implementation: str | None = None,
) -> Solution:
    """Smooth features within the regions of an image: minimise ``|X - Y|² + strength · Σ_pq g_pq (X_p - X_q)²``.

    The weighted least squares filter of Farbman et al. (SIGGRAPH 2008), with the weights of `solve`.

    Args:
        features: Y, [B, k, H, W] floating, not empty.
        guidance: [B, 3, H, W] floating, on the same device: the image, values 0 … 1.
        strength: at least 0, finite. 0 changes nothing.
        iterations: as for `solve`.
        colour_sigma: as for `solve`.
        tolerance: as for `solve`.
        implementation: as for `solve`.

    Returns:
        The smoothed features, as a solution.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    if features.ndim != 4 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"features: got {tuple(features.shape)} {features.dtype}, need [B, k, H, W] of a floating dtype, not empty"
        )
    _check_guidance(guidance, len(features), (features.shape[2], features.shape[3]), features.device)
    targets = features[:, None]
    return _solved(targets, None, guidance, features, strength, iterations, colour_sigma, tolerance, implementation)


def _solved(
    targets: Tensor,
    views: ViewMatrices | None,
    guidance: Tensor,
    start: Tensor,
    regularisation: float,
    iterations: int,
    colour_sigma: float,
    tolerance: float,
    implementation: str | None,
) -> Solution:
    """Check the scalars, and run an implementation; without views, the targets are the features themselves."""
    if not 0 <= regularisation < float("inf"):
        name = "strength" if views is None else "regularisation"
        raise ValueError(f"{name}: got {regularisation}, need a finite number of at least 0")
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, need at least 1")
    if not colour_sigma > 0:
        raise ValueError(f"colour_sigma: got {colour_sigma}, need a positive number")
    solver = dispatch.implementation("multiview", dispatch.choose("multiview", implementation, targets))
    solution: Solution = solver.solve(
        targets, views, guidance, start, regularisation, iterations, colour_sigma, tolerance
    )
    return solution


def explain(*kinds: Kind) -> Choice:
    """Tell which implementation solves for targets of this kind (`kernels.dispatch.kind`), and why the others don't.

    Raises:
        ValueError: ``DENSEFEAT_KERNELS`` selects an implementation that does not exist, or that cannot take them.
    """
    return dispatch.explain("multiview", *kinds)


def _check(targets: Tensor, views: ViewMatrices, guidance: Tensor, start: Tensor) -> None:
    if targets.ndim != 5 or not targets.is_floating_point() or targets.numel() == 0:
        raise ValueError(
            f"targets: got {tuple(targets.shape)} {targets.dtype}, need [B, V, k, h, w] of a floating dtype, not empty"
        )
    B, V, k, h, w = targets.shape
    if (len(views), views.low) != (V, (h, w)):
        raise ValueError(f"views: got {len(views)} views of {views.low}, need {V} of {(h, w)} as the targets")
    if views.rows.dtype != targets.dtype or views.rows.device != targets.device:
        raise ValueError(
            f"views: got {views.rows.dtype} on {views.rows.device}, need {targets.dtype} on {targets.device}"
        )
    _check_guidance(guidance, B, views.high, targets.device)
    if start.shape != (B, k, *views.high) or start.dtype != targets.dtype or start.device != targets.device:
        raise ValueError(
            f"start: got {tuple(start.shape)} {start.dtype} on {start.device}, need {(B, k, *views.high)} "
            f"{targets.dtype} on {targets.device}"
        )


def _check_guidance(guidance: Tensor, images: int, grid: tuple[int, int], device: torch.device) -> None:
    if guidance.shape != (images, 3, *grid) or not guidance.is_floating_point() or guidance.device != device:
        raise ValueError(
            f"guidance: got {tuple(guidance.shape)} {guidance.dtype} on {guidance.device}, need "
            f"{(images, 3, *grid)} of a floating dtype on {device}"
        )
