"""The dtypes that kernels take. What an implementation takes beside these tables is in its ``reasons_not``."""

import torch

__all__ = ["FLOATING", "HALF"]

HALF = (torch.float16, torch.bfloat16)  # computed in float32, rounded once at the end
FLOATING = (*HALF, torch.float32, torch.float64)  # what the operations of `kernels.jbu` let through
