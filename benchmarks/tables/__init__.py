"""The tables of README.md and docs/, made from the rows in ``results/``."""
