"""Windowed cross-attention: the public operation. It checks arguments and runs what fits."""

from kernels.window.attention.operations import windowed_attention

__all__ = ["windowed_attention"]
