"""One script per claim. Results go to ``results/``; ``benchmarks.tables`` makes the README's tables from them."""
