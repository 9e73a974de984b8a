"""Windowed cross-attention: the public operation, which checks arguments and runs an implementation."""

from kernels.window.attention.operations import windowed_attention

__all__ = ["windowed_attention"]
