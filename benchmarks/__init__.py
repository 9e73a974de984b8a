"""One script a claim. Rows go to ``results/``; the README's tables are made from them by ``benchmarks.tables``."""
