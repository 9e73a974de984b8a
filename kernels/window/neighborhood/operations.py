"""Neighbourhood attention across scales, the public operations.

Every high-res pixel is a weighted mean of the low-res values in the window of cells around its own cell.
`kernels.window.neighborhood.reference` is the definition.
"""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import Choice, Kind
from kernels.dtypes import FLOATING
from kernels.quantization import Codes, Quantization
from kernels.window.neighborhood import operators

__all__ = ["explain", "neighborhood_attention", "neighborhood_codes"]

_FAMILY = "neighborhood_attention"
_DTYPES = ", ".join(map(str, FLOATING))


def neighborhood_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int = 9,
    *,
    sum_heads: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Average values with attention weights, where each query attends to the cells around its own.

    NAF (arXiv 2511.18452, section 3). H and W are multiples of h and w. All pixels of low-res cell (i, j) attend to the
    cells ``clamp(i - window//2, 0, h - window)``, and the ``window - 1`` that follow, of the rows; equally of the
    columns. On a grid smaller than the window, they attend to all cells of that axis. Per head, the weights are
    softmax(query · key / √d). Where "triton" would run and a gradient is needed, the reference runs.

    Args:
        queries: [B, H, W, heads, d], float16, bfloat16, float32 or float64, not empty.
        keys: [B, h, w, heads, d], dtype and device of queries; h divides H, w divides W.
        values: [B, K, h, w], device of queries; its dtype may differ. Head number n averages channels n·K/heads to
            (n+1)·K/heads; heads divides K.
        window: cells along an axis; odd, at least 1.
        sum_heads: add the outputs of the heads, instead of concatenating them. A linear map of all channels can
            then be applied before the attention: each head's values are its channels, mapped by its part of the map.
        implementation: "cpu", "triton" or "reference"; None picks the first that can (`kernels.dispatch`).

    Returns:
        [B, K, H, W], or [B, K/heads, H, W] with ``sum_heads``, dtype of values; in channels_last memory format from
        "triton", else contiguous.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    _check(queries, keys, values, window)
    chosen = dispatch.choose(_FAMILY, implementation, queries, values)
    if chosen == "triton" and torch.is_grad_enabled() and any(t.requires_grad for t in (queries, keys, values)):
        chosen = "reference"
    run = operators.attention if chosen == "triton" else dispatch.implementation(_FAMILY, chosen).neighborhood_attention
    output: Tensor = run(queries, keys, values, window, sum_heads)
    return output


def neighborhood_codes(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    quantization: Quantization,
    window: int = 9,
    *,
    sum_heads: bool = False,
    implementation: str | None = None,
) -> Codes:
    """`neighborhood_attention` with quantized output, which avoids writing floats to memory. Not differentiable.

    Args:
        queries: as in `neighborhood_attention`.
        keys: as in `neighborhood_attention`.
        values: as in `neighborhood_attention`.
        quantization: steps and offsets float32, one per channel of the output, on the queries' device; steps > 0 (not
            checked).
        window: as in `neighborhood_attention`.
        sum_heads: as in `neighborhood_attention`.
        implementation: as in `neighborhood_attention`.

    Returns:
        Codes of the output, contiguous. Half-precision outputs are rounded before they are quantized, except by
        "triton", which quantizes the float32 sums: its codes may differ by one.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    _check(queries, keys, values, window)
    channels = values.shape[1] // queries.shape[3] if sum_heads else values.shape[1]
    _check_quantization(quantization, channels, values.device)
    chosen = dispatch.choose(_FAMILY, implementation, queries, values)
    with torch.no_grad():
        if chosen == "triton":
            scale = quantization.step, quantization.offset
            return Codes(*operators.codes(queries, keys, values, window, sum_heads, *scale))
        codes: Codes = dispatch.implementation(_FAMILY, chosen).neighborhood_codes(
            queries, keys, values, window, sum_heads, quantization
        )
        return codes


def explain(*kinds: Kind) -> Choice:
    """Tell which implementation runs on queries and values of these kinds, and why the others don't.

    Raises:
        ValueError: ``DENSEFEAT_KERNELS`` selects an implementation that does not exist, or that cannot take such
            inputs.
    """
    return dispatch.explain(_FAMILY, *kinds)


def _check(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> None:
    if queries.ndim != 5 or queries.dtype not in FLOATING or queries.numel() == 0:
        raise ValueError(
            f"queries: got shape {tuple(queries.shape)} and dtype {queries.dtype}, need [B, H, W, heads, d], not "
            f"empty, in {_DTYPES}"
        )
    B, H, W, heads, d = queries.shape
    if keys.ndim != 5 or (keys.shape[0], *keys.shape[3:]) != (B, heads, d) or keys.numel() == 0:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, need [{B}, h, w, {heads}, {d}] as queries, not empty")
    h, w = keys.shape[1:3]
    if H % h or W % w:
        raise ValueError(f"queries: got a size of {H}×{W}, need whole multiples of the keys' {h}×{w} on both axes")
    if (keys.dtype, keys.device) != (queries.dtype, queries.device):
        raise ValueError(f"keys: got {keys.dtype} on {keys.device}, need queries' {queries.dtype} on {queries.device}")
    if values.ndim != 4 or (values.shape[0], *values.shape[2:]) != (B, h, w) or values.numel() == 0:
        raise ValueError(f"values: got shape {tuple(values.shape)}, need [{B}, K, {h}, {w}] as keys, not empty")
    if values.shape[1] % heads:
        raise ValueError(f"values: got {values.shape[1]} channels, need a multiple of the {heads} heads")
    if values.dtype not in FLOATING or values.device != queries.device:
        raise ValueError(f"values: got {values.dtype} on {values.device}, need one of {_DTYPES} on {queries.device}")
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window: got {window!r}, need an odd integer, at least 1")


def _check_quantization(quantization: Quantization, channels: int, device: torch.device) -> None:
    if not isinstance(quantization, Quantization):
        raise ValueError(f"quantization: got {type(quantization).__name__}, need a Quantization")
    for name, tensor in (("step", quantization.step), ("offset", quantization.offset)):
        if tensor.shape != (channels,) or tensor.dtype != torch.float32 or tensor.device != device:
            raise ValueError(
                f"quantization.{name}: got shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, need "
                f"[{channels}], one per channel of the output, torch.float32 on {device}"
            )
