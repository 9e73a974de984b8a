"""Whether a store is that of an undisturbed run, and whole."""

import io
from collections.abc import Collection, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.chaos.storage import BUCKET, Storage

__all__ = ["differences", "problems"]

# They say when and where shards were made, or are left by writers that were killed; the card counts rows by status, of
# which the index has each.
_OF_THE_RUN = ("_ledger/", "_reports/", "_intents/", "_jobs/", "README.md")
_MANIFEST, _INDEX = "manifest.parquet", "index.parquet"


def differences(stored: Mapping[str, bytes], expected: Mapping[str, bytes], poison: Collection[int]) -> list[str]:
    """What differs between the objects of two stores, in words.

    Args:
        stored: of the disturbed run.
        expected: of the undisturbed one.
        poison: rows that are ``crashed`` in the first, and another failure in the second.
    """
    kept = [
        {key: data for key, data in store.items() if not key.startswith(_OF_THE_RUN) and key != _MANIFEST}
        for store in (stored, expected)
    ]
    found = [f"{key} is missing" for key in sorted(kept[1].keys() - kept[0].keys())]
    found += [f"{key} is not in the undisturbed store" for key in sorted(kept[0].keys() - kept[1].keys())]
    same = sorted((kept[0].keys() & kept[1].keys()) - {_INDEX})
    found += [f"{key} has other bytes" for key in same if kept[0][key] != kept[1][key]]
    if _INDEX in kept[0] and _INDEX in kept[1]:
        found += _of_index(kept[0][_INDEX], kept[1][_INDEX], poison)
    return found


def _of_index(stored: bytes, expected: bytes, poison: Collection[int]) -> list[str]:
    ours, theirs = (pq.read_table(io.BytesIO(data)) for data in (stored, expected))
    found = []
    if ours.schema != theirs.schema or ours.num_rows != theirs.num_rows:
        return ["the index has other columns or rows"]
    for row, (status, error) in enumerate(zip(ours["status"].to_pylist(), ours["error"].to_pylist(), strict=True)):
        if status == "pending" or (status != "ok" and not error):
            found.append(f"row {row} is {status}, with the reason {error!r}")
        if row in poison and status != "crashed":
            found.append(f"row {row} has poison, and is {status}")
    for name in ours.column_names:
        one, other = ours[name].to_pylist(), theirs[name].to_pylist()
        rows = [row for row, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        if name in ("status", "error"):
            rows = [row for row in rows if row not in poison]
        found += [f"index, row {row}: {name} is {one[row]!r}, not {other[row]!r}" for row in rows]
    return found


def problems(prefix: str, storage: Storage) -> list[str]:
    """What `jobs.verify_store` finds wrong with a store, if anything."""
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "jobs.verify_store", "--store", f"s3://{BUCKET}/{prefix}"]
    environment = {**os.environ, **storage.environment(faults=False)}
    verified = subprocess.run(command, env=environment, capture_output=True, text=True)
    return [] if verified.returncode == 0 else [f"verify_store ended with {verified.returncode}: {verified.stderr}"]


def failed_rows(index: bytes) -> dict[str, int]:
    """Number of failed rows by status."""
    statuses: pa.Table = pq.read_table(io.BytesIO(index), columns=["status"])
    counts = statuses["status"].value_counts().to_pylist()
    return {count["values"]: count["counts"] for count in counts if count["values"] != "ok"}
