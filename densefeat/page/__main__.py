"""Serve the page of a store: ``python -m densefeat.page STORE``."""

import argparse
import sys

from densefeat.errors import DensefeatError
from densefeat.page.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for an error with its message on stderr."""
    parser = argparse.ArgumentParser("python -m densefeat.page", description="Look at a store in the browser.")
    parser.add_argument("store", help="folder or URI of the store")
    parser.add_argument("--images", help="folder or URI with the photographs, by key; default: the URI of each row")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free port")
    parser.add_argument("--token", help="token that each request must carry; default on other hosts: a random one")
    options = parser.parse_args(arguments)
    try:
        serve(options.store, images=options.images, host=options.host, port=options.port, token=options.token)
    except (DensefeatError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
