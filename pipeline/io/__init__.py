"""Places that a job writes to, checked before the work; and the one explainer of storage errors.

Imports the reader alone.
"""
