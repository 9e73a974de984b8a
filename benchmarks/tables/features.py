"""Tables of backbones' features: which layers, and how many components."""

from benchmarks import rows
from benchmarks.tables import formats
from benchmarks.tables.evaluation import HEADINGS
from pipeline.evaluate.bootstrap import Estimate

# Task and its figure.
_COMPONENTS = (
    ("segmentation", "mean IoU"),
    ("segmentation", "border accuracy"),
    ("depth", "RMSE"),
    ("keypoints", "PCK@0.1 of the box"),
)


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


def components() -> str:
    """Tasks by number of components, with differences to the default, and the cosine of the channels that PCA keeps."""
    latest = {(row["backbone"], row["k"], row["task"]): row for row in rows.read("components")}
    kept = {backbone: row["figures"] for (backbone, _, task), row in latest.items() if task == "reconstruction"}
    known = {**HEADINGS, ("segmentation", "border accuracy"): "near a border"}
    headings = [known[column] for column in _COMPONENTS]
    table = [
        f"| backbone | `--components` | cosine | {' | '.join(headings)} |",
        f"|---|---|---|{'---|' * len(headings)}",
    ]
    for backbone, figures in kept.items():
        for k in sorted(k for other, k, task in latest if (other, task) == (backbone, "segmentation")):
            cells = []
            for task, figure in _COMPONENTS:
                of_figure = latest[backbone, k, task]["figures"][figure]
                difference = Estimate.of(of_figure["difference"])
                is_default = difference.low == difference.high
                cells.append(f"{of_figure['value']['mean']:.3f}" if is_default else formats.gain(difference))
            of_count = figures.get(f"{k} components")
            cosine = "" if of_count is None else f"{of_count['value']['mean']:.3f}"
            table.append(f"| {backbone} | {k} | {cosine} | {' | '.join(cells)} |")
    return (
        "Tasks of [evaluation](evaluation.md) by number of components: the first of one basis, `jbu`, 224 px "
        "(`python -m benchmarks.evaluate.components --stores FOLDER`). 64: the figure; others: paired difference to it "
        "with its 95% interval, bold where that excludes zero; ↓: less is better. Cosine: of the backbone's channels "
        "before and after PCA, mean over cells.\n\n"
    ) + "\n".join(table)
