"""Floats to what is stored: int8 codes with one step a component, or float16.

All components share one error floor (``step_c = max(8·σ_c / 127, floor · rms)``): where every component had a step of
its own size, components of little variance would cost as many bits as the first. Rounding to a step errs by
step/√12, so a floor f costs about f²/24 of cosine similarity: 0.9996 at 0.1, 0.997 at 0.25.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

INT8_MAX = 127
RANGE_SIGMAS = 8  # codes reach 8 σ of a component before they clip


def steps(mean_square: npt.NDArray[np.float64], floor: float) -> npt.NDArray[np.float32]:
    """Step of each component [k] from the mean square [k] of its upsampled values."""
    own = RANGE_SIGMAS * np.sqrt(mean_square) / INT8_MAX
    common = floor * np.sqrt(mean_square.mean())
    # A component that is zero everywhere still needs a step that can be divided by.
    step: npt.NDArray[np.float32] = np.maximum(np.maximum(own, common), np.finfo(np.float32).tiny).astype(np.float32)
    return step


def quantize(features: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Features [B, k, H, W] as they are stored, contiguous on the device where they are.

    Args:
        features: float.
        step: [k] float32 for int8 codes; None for float16.

    Returns:
        Codes [B, k, H, W] (int8 −127 … 127, or float16); [B] bool, False for images with a NaN or infinity (or
        beyond float16); and how many values were clipped to the int8 range.
    """
    if step is None:
        stored = features.to(torch.float16)
        # A sum is finite only if every term is, and costs one pass; float64, so that finite terms cannot overflow it.
        return stored.contiguous(), stored.sum((1, 2, 3), dtype=torch.float64).isfinite(), 0
    scaled = features / step[:, None, None]
    finite = scaled.sum((1, 2, 3)).isfinite()
    scaled.round_()
    clipped = int((scaled.abs() > INT8_MAX)[finite].sum())
    codes = scaled.nan_to_num_(0).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes.contiguous(), finite, clipped
