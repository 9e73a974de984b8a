"""Loops of `benchmarks.kernels.jbu_peers` on a GPU: one thread per value, all reads from memory, float32 sums."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def grid(output: Tensor) -> Any:
    return lambda meta: (triton.cdiv(output.numel(), meta["BLOCK"]),)


@triton.jit
def forward(padded, filters, output, C, H, W, n: tl.constexpr, BLOCK: tl.constexpr):
    """padded [C, H+n-1, W+n-1], filters [H, W, n, n] -> output [C, H, W]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < C * H * W
    c, y, x = i // (H * W), i // W % H, i % W
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(n * n):
        a, b = tap // n, tap % n
        weight = tl.load(filters + (y * W + x) * n * n + tap, inside, 0).to(tl.float32)
        total += weight * tl.load(padded + (c * (H + n - 1) + y + a) * (W + n - 1) + x + b, inside, 0).to(tl.float32)
    tl.store(output + i, total.to(output.dtype.element_ty), inside)


@triton.jit
def of_padded(gradient, filters, output, C, H, W, n: tl.constexpr, BLOCK: tl.constexpr):
    """gradient [C, H, W], filters [H, W, n, n] -> output [C, H+n-1, W+n-1]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    PH, PW = H + n - 1, W + n - 1
    inside = i < C * PH * PW
    c, py, px = i // (PH * PW), i // PW % PH, i % PW
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(n * n):
        y, x = py - tap // n, px - tap % n
        valid = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        weight = tl.load(filters + (y * W + x) * n * n + tap, valid, 0).to(tl.float32)
        total += weight * tl.load(gradient + (c * H + y) * W + x, valid, 0).to(tl.float32)
    tl.store(output + i, total.to(output.dtype.element_ty), inside)


@triton.jit
def of_filters(gradient, padded, output, C, H, W, n: tl.constexpr, BLOCK: tl.constexpr):
    """gradient [C, H, W], padded [C, H+n-1, W+n-1] -> output [H, W, n, n]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < H * W * n * n
    tap, x, y = i % (n * n), i // (n * n) % W, i // (n * n * W)
    a, b = tap // n, tap % n
    total = tl.zeros([BLOCK], tl.float32)
    for c in range(C):
        of_output = tl.load(gradient + (c * H + y) * W + x, inside, 0).to(tl.float32)
        total += of_output * tl.load(padded + (c * (H + n - 1) + y + a) * (W + n - 1) + x + b, inside, 0).to(tl.float32)
    tl.store(output + i, total.to(output.dtype.element_ty), inside)
