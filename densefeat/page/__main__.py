"""Serve the page of a store: ``python -m densefeat.page STORE``, the same as ``densefeat browse STORE``."""

import sys

from densefeat.command_line import main

if __name__ == "__main__":
    main(["browse", *sys.argv[1:]])
