"""Make the README's tables from the rows in ``results/``.

python -m benchmarks.tables           # rewrite them
python -m benchmarks.tables --check   # fail if they are not what the rows say
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks import rows

README = Path(__file__).parents[1] / "README.md"


def main_job() -> str:
    """The main job on a CPU: the latest row of each backbone and number of images."""
    latest = {(row["backbone"], row["images"]): row for row in rows.read("main_job")}
    table = [
        "| backbone, layer | images | images/s | ms an image: backbone / upsample / quantize / encode / decode "
        "| MB an image | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in latest.values():
        stages = row["stage_ms_per_image"]
        times = " / ".join(f"{stages[stage]:.0f}" for stage in ("backbone", "upsample", "quantize", "encode", "decode"))
        table.append(
            f"| `{row['backbone']}`, {row['layer']} | {row['images']:,} | {row['images_per_s']:.1f} | {times} "
            f"| {row['store_bytes_per_image'] / 1e6:.2f} | {row['peak_bytes'] / 1e9:.2f} GB |"
        )
    sample = next(iter(latest.values()))
    return (
        f"The main job on {_machine(sample)}: k = {sample['k']}, {sample['size']} px, int8, training-free JBU, 200 "
        "COCO photographs, and the same five times (`python -m benchmarks.main_job`). Stages overlap on the cores; "
        "memory is that of all processes, Ray's included.\n\n"
    ) + "\n".join(table)


def upsampling_cpu() -> str:
    """JBU on a CPU against its definition in plain torch."""
    latest = {(row["what"], row["threads"]): row for row in rows.read("upsampling_cpu")}
    table = ["| k = 64, one image | threads | densefeat | plain torch | ratio |", "|---|---|---|---|---|"]
    for (what, threads), row in latest.items():
        ms = row["ms"]
        table.append(
            f"| {what} | {threads} | {ms['cpu']:.1f} ms | {ms['reference']:.0f} ms | {row['reference_over_cpu']:.0f}× |"
        )
    sample = next(iter(latest.values()))
    return (
        f"Training-free JBU on {_machine(sample)}, medians of 11 runs in turn "
        "(`python -m benchmarks.upsampling_cpu`):\n\n"
    ) + "\n".join(table)


def _machine(row: dict[str, Any]) -> str:
    return f"{row['cores']} cores ({row['device']})"


def demo() -> str:
    """The demonstration from nothing, and again."""
    row = rows.read("demo")[-1]
    return (
        f"`make demo` from a clone, with {row['installer']} and an empty package cache: {row['first_s']:.0f} s, again: "
        f"{row['again_s']:.0f} s, on {_machine(row)} (`python -m benchmarks.demo`)."
    )


TABLES = {"demo": demo, "main_job": main_job, "upsampling_cpu": upsampling_cpu}


def with_tables(text: str) -> str:
    """``text`` with what is between each table's marks made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, rest = text.split(start)
        text = before + start + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    """Rewrite or check."""
    old = README.read_text()
    new = with_tables(old)
    if "--check" in sys.argv:
        if old != new:
            sys.exit("README.md: its tables are not what benchmarks/results says: run python -m benchmarks.tables")
        return
    README.write_text(new)


if __name__ == "__main__":
    main()
