"""Upsampling operations: a public op, its plain-torch reference, and one file an implementation."""
