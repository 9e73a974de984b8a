"""Make the tables of README.md and docs/ from the rows in ``results/``.

python -m benchmarks.tables           # rewrite them
python -m benchmarks.tables --check   # fail if they are out of date
"""

import sys

from benchmarks.tables.documents import DOCUMENTS, ROOT, with_tables


def main() -> None:
    """Rewrite or check the tables."""
    for document in DOCUMENTS:
        old = document.read_text()
        new = with_tables(old)
        if old == new:
            continue
        name = document.relative_to(ROOT)
        if "--check" in sys.argv:
            sys.exit(f"{name}: its tables do not match benchmarks/results: run python -m benchmarks.tables")
        document.write_text(new)


if __name__ == "__main__":
    main()
