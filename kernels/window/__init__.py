"""Attention within windows, and sums over them."""
