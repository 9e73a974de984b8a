"""Checks of the outputs of a job before the work, and messages for storage errors."""
