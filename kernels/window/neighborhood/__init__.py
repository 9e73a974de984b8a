"""Neighbourhood attention across scales: the public operations, which check arguments and run an implementation."""

from kernels.quantization import Codes, Quantization
from kernels.window.neighborhood.operations import explain, neighborhood_attention, neighborhood_codes

__all__ = ["Codes", "Quantization", "explain", "neighborhood_attention", "neighborhood_codes"]
