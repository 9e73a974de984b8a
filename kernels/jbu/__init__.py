"""Joint bilateral upsampling: the public operations, which check arguments and run an implementation."""

from kernels.dispatch import Choice
from kernels.jbu.operations import (
    adaptive_conv_upsample2x,
    bilateral_codes,
    bilateral_kernel,
    bilateral_stage,
    explain,
    learned_codes,
    learned_kernel,
    learned_stage,
)
from kernels.jbu.parameters import JBUStack, JBUStage
from kernels.quantization import Codes, Quantization

__all__ = [
    "Choice",
    "Codes",
    "JBUStack",
    "JBUStage",
    "Quantization",
    "adaptive_conv_upsample2x",
    "bilateral_codes",
    "bilateral_kernel",
    "bilateral_stage",
    "explain",
    "learned_codes",
    "learned_kernel",
    "learned_stage",
]
