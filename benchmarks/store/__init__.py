"""Bytes and error of stores, and what reading them costs, against other formats of the same features."""
