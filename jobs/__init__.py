"""Command-line programs: ``python -m jobs.NAME``."""
