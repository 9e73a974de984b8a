"""Choose the quantization steps from the scale of the upsampled features in a sample of the images.

The PCA eigenvalues do not give that scale, because a learned upsampler changes it.

All components share one error floor (``step_c = max(8·σ_c / 127, floor · rms)``). Without it, the step of every
component would be proportional to its σ, and components of little variance would cost as many bits as the first.
Rounding to a step has an error of step/√12, so a floor f costs about f²/24 of cosine similarity: 0.9996 at 0.1, 0.997
at 0.25.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densefeat import layout
from kernels.quantization import INT8_MAX, Encoding

__all__ = ["Calibration", "choose_steps"]

_RANGE_SIGMAS = 8  # codes cover ±8 σ of a component before they clip


@dataclass(frozen=True)
class Calibration:
    """Sums over images.

    Attributes:
        mean_square: sum over images of each component's mean square over the pixels, [k] float64.
        nbytes: size of the encoded images, each quantized with its own steps: an estimate of their size in the store,
            guidance images included.
    """

    mean_square: npt.NDArray[np.float64]
    nbytes: float

    @classmethod
    def none(cls, components: int) -> "Calibration":
        """Calibration of no images: all sums are zero."""
        return cls(np.zeros(components), 0.0)

    @classmethod
    def of(cls, values: Tensor, dtype: str, error_floor: float, guidance_nbytes: int = 0) -> "Calibration | None":
        """Calibration of one image's values to be stored [k, H, W]; None if any of them is not finite."""
        mean_square = values.square().mean((1, 2), dtype=torch.float64).cpu().numpy()
        if not np.isfinite(mean_square).all():
            return None
        encoding = Encoding.of_steps(choose_steps(dtype, mean_square, error_floor), values.device)
        codes = encoding.encode(values[None])
        return cls(mean_square, len(layout.encode_chunk(codes.codes[0].cpu().numpy())) + guidance_nbytes)

    def merged(self, other: "Calibration") -> "Calibration":
        """Calibration of the images of both."""
        return Calibration(self.mean_square + other.mean_square, self.nbytes + other.nbytes)


def choose_steps(
    dtype: str, mean_square: npt.NDArray[np.float64], error_floor: float
) -> npt.NDArray[np.float32] | None:
    """Choose the quantization step of each component from the mean square of its upsampled values.

    Args:
        dtype: data type of the store, "int8" or "float16".
        mean_square: mean square of each component, [k] float64, at least 0.
        error_floor: smallest step, in units of the root mean square over all components.

    Returns:
        Steps > 0, [k] float32; None for float16, which has no steps.
    """
    if dtype == "float16":
        return None
    own = _RANGE_SIGMAS * np.sqrt(mean_square) / INT8_MAX
    common = error_floor * np.sqrt(mean_square.mean())
    # A component that is zero everywhere still needs a nonzero step to divide by.
    step: npt.NDArray[np.float32] = np.maximum(np.maximum(own, common), np.finfo(np.float32).tiny).astype(np.float32)
    return step
