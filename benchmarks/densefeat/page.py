"""How long the page takes for a heat map, over its HTTP interface.

    python -m benchmarks.densefeat.page STORE

The store must have at least 40 images; a row is added to results/page.jsonl.
"""

import itertools
import sys
import time

from starlette.testclient import TestClient

from benchmarks import rows
from benchmarks.timing import median_ms
from densefeat import FeatureStore
from densefeat.page import create_app


def main() -> None:
    """Measure and record."""
    store = FeatureStore(sys.argv[1])
    client = TestClient(create_app(sys.argv[1]), base_url="http://localhost")
    k, height, width = store.shape
    places = itertools.cycle([(x, y) for x in range(5, width, 17) for y in range(5, height, 17)])
    unseen = iter(range(1, len(store)))

    def get(path: str) -> bytes:
        answer = client.get(path)
        answer.raise_for_status()
        return answer.content

    def point() -> str:
        x, y = next(places)
        return f"from=0&point={x}.5,{y}.5"

    first = median_ms(
        {"heat map of another image, not seen before": lambda: get(f"/api/heat/{next(unseen)}?{point()}")},
        "cpu",
        seconds_each=0.5,
        most=10,
    )
    get(f"/api/similar?{point()}")
    while not client.get(f"/api/similar?{point()}").json()["sample"]["complete"]:
        time.sleep(0.2)
    ms = median_ms(
        {
            "heat map": lambda: get(f"/api/heat/0?{point()}"),
            "ranking": lambda: get(f"/api/similar?{point()}"),
            "segments": lambda: get(f"/api/segments/{next(unseen)}?count=6"),
        },
        "cpu",
        most=20,
    )
    sample = client.get(f"/api/similar?{point()}").json()["sample"]["images"]
    row = {"k": k, "height": height, "width": width, "dtype": store.layout.dtype, "sample": sample}
    rows.append("page", {**row, "ms": {name: round(value, 2) for name, value in {**first, **ms}.items()},
                         **rows.measured_on()})  # fmt: skip


if __name__ == "__main__":
    main()
