"""One script per claim.

Results go to ``results/``; ``benchmarks.tables`` makes the tables of README.md and docs/ from them.
"""
