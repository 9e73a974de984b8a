"""Windowed cross-attention, the public operation: every output pixel is a weighted mean of nearby low-res values.

`kernels.window.attention.reference` is the definition.
"""

import math

from torch import Tensor

from kernels import dispatch

__all__ = ["windowed_attention"]


def windowed_attention(
    queries: Tensor, keys: Tensor, values: Tensor, window_ratio: float, *, implementation: str | None = None
) -> Tensor:
    """Average values with attention weights, where each query attends only to the keys in its window.

    AnyUp (arXiv 2510.12764, section 4). Per head, the weights are softmax(query · key / √d) over the window; they are
    then averaged over the heads and applied to the values once. The windows are those of
    `kernels.window.attention.reference.window_bounds`.

    Args:
        queries: [B, H, W, heads, d], floating, not empty.
        keys: [B, h, w, heads, d], dtype and device of queries.
        values: [B, k, h, w], floating; its dtype may differ. Not projected: the output consists of means of them.
        window_ratio: reach of a window to each side, as a share of the axis: 0.1 covers about a fifth of each axis, 1
            or more covers everything. Finite, greater than 0.
        implementation: "tiled" (bounded memory) or "reference" (the whole attention matrix); None picks the first that
            can (`kernels.dispatch`).

    Returns:
        [B, k, H, W], dtype of values.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    _check(queries, keys, values, window_ratio)
    chosen = dispatch.choose("window_attention", implementation, queries, values)
    output: Tensor = dispatch.implementation("window_attention", chosen).windowed_attention(
        queries, keys, values, window_ratio
    )
    return output


def _check(queries: Tensor, keys: Tensor, values: Tensor, window_ratio: float) -> None:
    if queries.ndim != 5 or not queries.is_floating_point() or queries.numel() == 0:
        raise ValueError(
            f"queries: got shape {tuple(queries.shape)} and dtype {queries.dtype}, need [B, H, W, heads, d], floating, "
            "not empty"
        )
    B, _, _, heads, d = queries.shape
    if keys.ndim != 5 or (keys.shape[0], *keys.shape[3:]) != (B, heads, d) or keys.numel() == 0:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, need [{B}, h, w, {heads}, {d}] as queries, not empty")
    if (keys.dtype, keys.device) != (queries.dtype, queries.device):
        raise ValueError(f"keys: got {keys.dtype} on {keys.device}, need queries' {queries.dtype} on {queries.device}")
    if values.ndim != 4 or (values.shape[0], *values.shape[2:]) != tuple(keys.shape[:3]) or values.numel() == 0:
        raise ValueError(
            f"values: got shape {tuple(values.shape)}, need [{B}, k, {keys.shape[1]}, {keys.shape[2]}] for keys "
            f"{tuple(keys.shape)}, not empty"
        )
    if not values.is_floating_point() or values.device != queries.device:
        raise ValueError(f"values: got {values.dtype} on {values.device}, need a floating dtype on {queries.device}")
    if not (math.isfinite(window_ratio) and window_ratio > 0):
        raise ValueError(f"window_ratio: got {window_ratio}, need a finite number greater than 0")
