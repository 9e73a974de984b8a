"""Table of what jobs have survived."""

from benchmarks import rows
from benchmarks.tables import formats

_TITLES = {
    "workers": "workers killed",
    "nodes": "nodes lost: their main process killed, or all at once",
    "driver": "the driver killed, and the command repeated with `--resume`",
    "stopped": "workers stopped for 15 to 45 s, then continued",
    "poison": "images that crash the decoder (SIGSEGV)",
    "corrupt": "a twentieth of the files damaged",
    "storage": "503, late, lost and no answers, outages of 5 to 10 s",
    "clock": "a node, then another, with a clock that is off by an hour",
    "drained": "nodes preempted with a notice of 5 to 14 s",
    "all": "all of these",
}


def chaos() -> str:
    """Each scenario's latest run."""
    latest = {row["scenario"]: row for row in rows.read("chaos")}
    found = [latest[name] for name in _TITLES if name in latest]
    table = [
        "| what fails | faults | restarts | seconds | rows that failed | shards computed twice |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        failed = ", ".join(f"{count} {status}" for status, count in sorted(row["failed_rows"].items())) or "none"
        faults = row["faults"] + row["poison"] + row["corrupt"]
        table.append(
            f"| {_TITLES[row['scenario']]} | {faults} | {row['restarts']} | {row['seconds']:.0f} | {failed} "
            f"| {row['shards_computed_again']} of {row['shards']} |"
        )
    images, workers = (" or ".join(map(str, sorted({row[name] for row in found}))) for name in ("images", "workers"))
    return (
        f"{images} images in shards of 4, {workers} nodes of Ray, each with one worker, on "
        f"{formats.machine(found[-1])} (`make chaos`). All stores were those of a job without faults. Faults "
        "include damaged images, but not nodes that start with a wrong clock. Computed twice: to their end, so that "
        "both were about to be written.\n\n"
    ) + "\n".join(table)
