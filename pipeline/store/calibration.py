"""How large features are after upsampling, from a sample: what the quantization steps are chosen by.

Not from the PCA's eigenvalues: a learned upsampler changes scales.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densefeat import layout
from kernels.quantization import Quantization
from kernels.quantize import quantize, steps, to_float16

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Sums over images.

    Attributes:
        mean_square: [k] float64, of each component over an image's pixels.
        nbytes: of the encoded images, each quantized with steps of its own: an estimate of what they will take.
    """

    mean_square: npt.NDArray[np.float64]
    nbytes: float

    @classmethod
    def none(cls, components: int) -> "Calibration":
        """Of no image."""
        return cls(np.zeros(components), 0.0)

    @classmethod
    def of(cls, features: Tensor, dtype: str, error_floor: float) -> "Calibration | None":
        """Of one image's features [k, H, W]; None if they are not finite."""
        mean_square = features.square().mean((1, 2), dtype=torch.float64).cpu().numpy()
        if not np.isfinite(mean_square).all():
            return None
        if dtype == "int8":
            step = torch.tensor(steps(mean_square, error_floor), device=features.device)
            codes = quantize(features[None], Quantization(step, torch.zeros_like(step)))
        else:
            codes = to_float16(features[None])
        return cls(mean_square, len(layout.encode_chunk(codes.codes[0].cpu().numpy())))

    def merged(self, other: "Calibration") -> "Calibration":
        """Of both."""
        return Calibration(self.mean_square + other.mean_square, self.nbytes + other.nbytes)
