"""What Triton kernels need: a version of Triton, a GPU, and dtypes."""

import os
from collections.abc import Sequence

import torch
import triton

from kernels.dispatch import Kind, not_of_dtypes
from kernels.dtypes import HALF

__all__ = ["INTERPRETED", "not_for_triton"]

# Whether Triton interprets kernels on the CPU, which is for tests. Like Triton, read once.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DTYPES = (*HALF, torch.float32)
_CAPABILITY = (8, 0)
_TRITON = (3, 4)  # the oldest version that was tested and compiles every kernel


def not_for_triton(kinds: Sequence[Kind]) -> list[str]:
    """Every reason why Triton kernels cannot take inputs of these kinds; none if they can.

    They take float32, float16 and bfloat16 on NVIDIA GPUs of compute capability 8.0 (Ampere) or more. They run on the
    CPU only if Triton interprets them (TRITON_INTERPRET=1), which is for tests.
    """
    reasons = []
    if tuple(map(int, triton.__version__.split(".")[:2])) < _TRITON:
        need = ".".join(map(str, _TRITON))
        reasons.append(f"it needs Triton {need} or newer, {triton.__version__} is installed: upgrade PyTorch")
    reasons += not_of_dtypes(kinds, _DTYPES)
    for device in sorted({kind.device for kind in kinds}, key=str):
        if device.type == "cpu" and INTERPRETED:
            continue
        if device.type != "cuda" or torch.version.hip is not None:
            reasons.append(f"it runs on NVIDIA GPUs, inputs are on {device}")
        elif torch.cuda.get_device_capability(device) < _CAPABILITY:
            got, need = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(device), _CAPABILITY))
            reasons.append(f"it needs compute capability {need} or more, {device} has {got}")
    return reasons
