"""Tables of backbones' features: which layers."""

from benchmarks import rows
from benchmarks.tables import formats
from pipeline.evaluate.bootstrap import Estimate


def layers() -> str:
    """A linear probe by layer, with differences to the default layers."""
    latest = {(row["backbone"], row["layer"]): row for row in rows.read("layers")}
    table = [
        "| backbone | `--layer` | mean IoU | − default | near a border | − default |",
        "|---|---|---|---|---|---|",
    ]
    for (backbone, layer), row in latest.items():
        cells = []
        for metric in ("miou", "border_accuracy"):
            if metric not in row:
                cells += ["", ""]
                continue
            difference = Estimate.of(row[f"{metric}_difference"])
            is_default = difference.low == difference.high
            cells += [f"{row[metric]['mean']:.3f}", "default" if is_default else formats.gain(difference)]
        table.append(f"| {backbone} | {layer} | {' | '.join(cells)} |")
    row = next(iter(latest.values()))
    return (
        f"A linear probe of the 20 most frequent classes of coco200 by layer, 224 px, bilinear, k = {row['k']} "
        "(`python -m benchmarks.features.layers`), and the paired difference to the default with its 95% interval, "
        f"bold where that excludes zero. {row['runs']} classifiers, each trained on {row['photos']} photographs drawn "
        f"with replacement and evaluated on {row['photos']} others.\n\n"
    ) + "\n".join(table)
