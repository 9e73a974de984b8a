"""Dtypes that kernels accept. Further restrictions of an implementation are in its ``reasons_not``."""

import torch

__all__ = ["FLOATING", "HALF"]

HALF = (torch.float16, torch.bfloat16)  # computed in float32, rounded once at the end
FLOATING = (*HALF, torch.float32, torch.float64)  # accepted by the operations of `kernels.jbu`
