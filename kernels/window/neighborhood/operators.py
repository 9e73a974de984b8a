"""Register the Triton implementation as torch operators: schemas and output shapes. There are no gradients.

For `torch.compile` and export, an operator is opaque with a known output shape. The other implementations are plain
torch, and are called directly (`kernels.window.neighborhood.operations`).
"""

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.quantization import Codes, Quantization

__all__ = ["attention", "codes"]


def _triton() -> Any:
    return dispatch.implementation("neighborhood_attention", "triton")


@torch.library.custom_op("densefeat::neighborhood_attention", mutates_args=())
def attention(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool) -> Tensor:
    """As `kernels.window.neighborhood.neighborhood_attention` -> [B, channels, H, W], channels_last."""
    output: Tensor = _triton().neighborhood_attention(queries, keys, values, window, sum_heads)
    return output


@torch.library.custom_op("densefeat::neighborhood_codes", mutates_args=())
def codes(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, step: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.window.neighborhood.neighborhood_codes` -> the tensors of `Codes`."""
    run = _triton().neighborhood_codes
    made: Codes = run(queries, keys, values, window, sum_heads, Quantization(step, offset))
    return made.codes, made.not_finite, made.clipped


@attention.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool) -> Tensor:
    B, channels, H, W = _shape(queries, values, sum_heads)
    return values.new_empty(B, H, W, channels).permute(0, 3, 1, 2)


@codes.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, window: int, sum_heads: bool, *_: Any) -> tuple[Tensor, ...]:
    B, *sizes = _shape(queries, values, sum_heads)
    counts = [values.new_empty(B, dtype=torch.int32) for _ in range(2)]
    return values.new_empty(B, *sizes, dtype=torch.int8), counts[0], counts[1]


def _shape(queries: Tensor, values: Tensor, sum_heads: bool) -> tuple[int, int, int, int]:
    (B, H, W, heads, _), K = queries.shape, values.shape[1]
    return B, K // heads if sum_heads else K, H, W
