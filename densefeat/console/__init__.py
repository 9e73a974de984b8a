"""What the command ``densefeat`` prints and writes: figures of a store, its card, rows in a file."""
