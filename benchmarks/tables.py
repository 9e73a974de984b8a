"""Make the README's tables from the rows in ``results/``.

python -m benchmarks.tables           # rewrite them
python -m benchmarks.tables --check   # fail if they are out of date
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import rows
from pipeline.upsamplers.build import UPSAMPLERS

README = Path(__file__).parents[1] / "README.md"


def main_job() -> str:
    """The main job on a CPU and on a GPU: the latest row of each backbone and number of images."""
    latest = {
        (rows.on_gpu(row), row["backbone"], row["upsampler"], row["images"]): row for row in rows.read("main_job")
    }
    table = [
        "| device | backbone, layer | upsampler | images | images/s "
        "| ms per image: backbone / upsample and quantize / encode / decode | MB per image | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in latest.values():
        stages = row["stage_ms_per_image"]
        times = " / ".join(
            f"{stages[stage]:.0f}" if stages[stage] >= 1 else f"{stages[stage]:.1g}"
            for stage in ("backbone", "upsample", "encode", "decode")
        )
        table.append(
            f"| {'GPU' if rows.on_gpu(row) else 'CPU'} | `{row['backbone']}`, {row['layer']} | {row['upsampler']} "
            f"| {row['images']:,} "
            f"| {row['images_per_s']:.1f} | {times} "
            f"| {row['store_bytes_per_image'] / 1e6:.2f} | {row['peak_bytes'] / 1e9:.2f} GB |"
        )
    sample = next(iter(latest.values()))
    machines = " and ".join({rows.on_gpu(row): _machine(row) for row in latest.values()}.values())
    return (
        f"The main job on {machines}: k = {sample['k']}, {sample['size']} px, int8, 200 COCO photographs, and the same "
        "repeated five or ten times (`python -m benchmarks.jobs.main_job`). Stages overlap on the cores; memory is "
        "that of all processes, including Ray's.\n\n"
    ) + "\n".join(table)


def jbu_parts() -> str:
    """JBU on a CPU compared with its definition in plain torch: one stage, its parts, and stacks."""
    latest = {(row["part"], row["threads"]): row for row in rows.read("jbu_parts")}
    table = [
        "| k = 64, one image | 1 thread | plain torch | ratio | 2 threads | plain torch | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in dict.fromkeys(part for part, _ in latest):
        cells = []
        for threads in (1, 2):
            ms = latest[part, threads]["ms"]
            ratio = ms["plain torch"] / ms["densefeat"]
            cells += [f"{ms['densefeat']:.1f} ms", f"{ms['plain torch']:.0f} ms", f"{ratio:.0f}×"]
        table.append(f"| {part} | {' | '.join(cells)} |")
    sample = next(iter(latest.values()))
    return f"On {_machine(sample)}, medians of interleaved runs (`python -m benchmarks.kernels.jbu`):\n\n" + "\n".join(
        table
    )


def jbu() -> str:
    """Learned JBU ×16 to 224 px and its alternatives: time and memory per image."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows.read("jbu"):
        if row["sizes"] == "14→224" and (row["batch"], row["dtype"]) in ((1, "float32"), (32, "float16")):
            latest[tuple(row[name] for name in ("device", "C", "batch", "dtype", "passes"))] = row
    sides = list(dict.fromkeys(side for row in latest.values() for side in row["sides"]))
    table = [
        f"| device | C | batch | | floor | {' | '.join(sides)} |",
        "|---|---|---|---|---|" + "---|" * len(sides),
    ]
    for row in latest.values():
        cells = [_time_and_memory(row["sides"].get(side), row["batch"]) for side in sides]
        table.append(
            f"| {row['device']} | {row['C']} | {row['batch']} | {row['dtype']}, {row['passes']} "
            f"| {_ms(row['floor_ms_per_image'])} | {' | '.join(cells)} |"
        )
    return (
        "Four learned stages, 14×14 → 224×224: ms and peak MB per image, medians of interleaved runs "
        "(`python -m benchmarks.kernels.jbu`). Floor: source and image read once, output written once, at the "
        "bandwidth of a copy in the same run. More sizes are in `benchmarks/results/jbu.jsonl`.\n\n"
    ) + "\n".join(table)


def upsamplers() -> str:
    """The available upsamplers and their properties, from `Facts`."""
    table = ["| `--upsampler` | weights | channels | scale | guidance | PCA |", "|---|---|---|---|---|---|"]
    for name, upsampler in UPSAMPLERS.items():
        facts = upsampler.facts
        words = facts.weights, facts.channels, facts.scale, facts.guidance, facts.pca
        table.append(f"| `{name}` | {' | '.join(words)} |")
    return "\n".join(table)


def upsampler_costs() -> str:
    """Time and memory of each single-pass upsampler, with and without PCA and bounded memory."""
    latest = {(row["upsampler"], row["size"]): row for row in rows.read("upsamplers")}
    table = [
        "| upsampler | 224 px | 448 px | 896 px | all 384 channels, 224 px | 448 px | plain, 224 px | 448 px |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in latest):
        measured = [(latest[name, size], "k") for size in (224, 448, 896)]
        measured += [(latest[name, size], side) for side in ("all channels", "plain") for size in (224, 448)]
        cells = [
            f"{_ms(row['ms'][side])}, {row['peak_bytes'][side] / 1e6:,.0f} MB" if side in row["ms"] else ""
            for row, side in measured
        ]
        table.append(f"| {name} | {' | '.join(cells)} |")
    sample = latest["jbu", 224]
    return (
        f"From ViT-S/14's 384 channels to k = 64 at the image's size, one image, one thread of {_machine(sample)} "
        "(`python -m benchmarks.upsamplers.compared`). Plain: all channels, AnyUp with its full attention matrix, then "
        "PCA.\n\n"
    ) + "\n".join(table)


def fits() -> str:
    """Error on held-out views and time, for upsamplers that fit each image, and for bilinear and JBU."""
    latest = {(row["backbone"], row["method"]): row for row in rows.read("implicit") if not rows.on_gpu(row)}
    few = min(row["photos"] for row in latest.values())
    table = [
        f"| backbone | upsampler | error (share of bilinear's) | the same on {few} | s per image: fit | passes |",
        "|---|---|---|---|---|---|",
    ]
    # In order of time, as in the figure.
    for (backbone, method), row in sorted(latest.items(), key=lambda item: (item[0][0], sum(_fit_seconds(item[1])))):
        all_errors, few_errors = _errors(row, few)
        bilinear, few_bilinear = _errors(latest[backbone, "bilinear"], few)
        everywhere = "" if all_errors is None else f"{all_errors:.3f} ({all_errors / bilinear:.2f})"
        table.append(
            f"| {backbone} | {method} | {everywhere} | {few_errors:.3f} ({few_errors / few_bilinear:.2f}) "
            f"| {' | '.join(map(_seconds, _fit_seconds(row)))} |"
        )
    sample = next(iter(latest.values()))
    photos, step = max(row["photos"] for row in latest.values()), rows.read("implicit_steps")[-1]
    return (
        f"Squared error on 20 views of each of {photos} photographs (coco200's validation half, 224 px, k = 64) that "
        f"no fit has used, as a share of their variance. Seconds of one core of {_machine(sample)}, for the fit "
        "without the backbone's passes, and for these passes (`python -m benchmarks.upsamplers.implicit`, "
        "`benchmarks.upsamplers.implicit_featup`). FeatUp's networks are evaluated through the downsampler fitted "
        "with them if that gives a lower error. A step takes "
        f"{step['plain_step_s']:.2g} s implemented as in FeatUp, {step['step_s']:.2g} s here, and "
        f"{step['step_of_four_s']:.2g} s for four images together.\n\n"
    ) + "\n".join(table)


def probe() -> str:
    """Accuracy of a linear classifier on the features of each upsampler."""
    latest = {(row["backbone"], row["method"]): row for row in rows.read("probe")}
    table = [
        "| backbone | upsampler | mean IoU | accuracy | within 3 px of a border |",
        "|---|---|---|---|---|",
    ]
    for (backbone, method), row in latest.items():
        numbers = " | ".join(f"{row[name]:.3f}" for name in ("miou", "accuracy", "border_accuracy"))
        table.append(f"| {backbone} | {method} | {numbers} |")
    photos = next(iter(latest.values()))["photos"]
    return (
        f"A linear probe of the 20 most frequent classes, trained on {photos} photographs of coco200 and evaluated on "
        f"{photos} others, 224 px, k = 64 (`python -m benchmarks.upsamplers.probe`):\n\n"
    ) + "\n".join(table)


def training() -> str:
    """Error on held-out views before and after training, and of upsamplers without training."""
    latest = {row["recipe"]: row for row in rows.read("training")}
    table = [
        "| recipe | steps | s per step, backbone's share | measured on | before | after | bilinear "
        "| training-free jbu |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, row in latest.items():
        seconds = sum(row["step_s"].values())
        share = row["step_s"]["backbone"] / seconds
        for backbone, own in rows.by_backbone(row["held_out"]).items():
            trained = recipe.split()[0]
            seen = "" if own[0]["trained_on"] == "1" else ", not trained on"
            errors = [own[0][f"{trained}_relative_error"], own[-1][f"{trained}_relative_error"]]
            errors += [own[0][f"{other}_relative_error"] for other in ("bilinear", "training_free")]
            cells = " | ".join(f"{float(error):.3f}" for error in errors)
            table.append(
                f"| {recipe} | {own[-1]['step']} | {seconds:.1f}, {share:.0%} | `{backbone}`{seen} | {cells} |"
            )
    sample = next(iter(latest.values()))
    return (
        "Squared error on views of photographs of coco200's validation half, not used in training, as a share of their "
        f"variance; trained on the other 100, on one core of {_machine(sample)} "
        "(`python -m benchmarks.train.training`). LiFT runs the backbone only in the first epoch, then it uses cached "
        "features.\n\n"
    ) + "\n".join(table)


def _errors(row: dict[str, Any], few: int) -> tuple[Any, float]:
    """Mean error on all photographs (None if measured on few), and on ``few`` of them, spread evenly."""
    if "errors" in row:
        return row["held_out_error"], statistics.mean(row["errors"][:: len(row["errors"]) // few])
    return None, min(row["held_out_error"], row["own_error"])


def _fit_seconds(row: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the fit, and of the backbone's passes over its views."""
    return row["fit_s"], row["extraction_s"]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s" if value else "none"


def _time_and_memory(measured: dict[str, Any] | None, batch: int) -> str:
    if measured is None:
        return "out of memory"
    return f"{_ms(measured['ms_per_image'])}, {measured['peak_bytes'] / batch / 1e6:,.0f} MB"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _machine(row: dict[str, Any]) -> str:
    return f"{row['cores']} cores ({row['device']})"


def demo() -> str:
    """Seconds of the demo from a fresh clone, and of a repetition."""
    row = rows.read("demo")[-1]
    return (
        f"`make demo` from a clone, with {row['installer']} and an empty package cache: {row['first_s']:.0f} s, "
        f"repeated: {row['again_s']:.0f} s, on {_machine(row)} (`python -m benchmarks.jobs.demo`)."
    )


def headline() -> str:
    """Rates and size of the main job, one line: the latest row with most images on a GPU and on a CPU."""
    best = {}
    for row in rows.read("main_job"):
        if row["backbone"] == "tf_efficientnet_lite0":
            found = best.get(rows.on_gpu(row))
            if found is None or row["images"] >= found["images"]:
                best[rows.on_gpu(row)] = row
    gpu, cpu = best[True], best[False]
    return (
        f"EfficientNet-Lite0, {gpu['k']} components, {gpu['size']}×{gpu['size']}, int8: "
        f"{gpu['images_per_s']:.0f} images/s on one {gpu['device'].split(' 80GB')[0]} with {gpu['cores']} cores, "
        f"{cpu['images_per_s']:.0f} on {cpu['cores']} cores without a GPU; "
        f"{gpu['store_bytes_per_image'] / 1e6:.1f} MB per image."
    )


def page() -> str:
    """Heat maps of the page."""
    row = rows.read("page")[-1]
    ms = row["ms"]
    return (
        f"At {row['height']}² × {row['k']}, on {_machine(row)}: {_ms(ms['heat map'])} from the request to the heat "
        f"map, {_ms(ms['heat map of another image, not seen before'])} for an image not seen before, "
        f"{_ms(ms['ranking'])} to rank {row['sample']} images (`python -m benchmarks.densefeat.page`)."
    )


TABLES = {
    "headline": headline,
    "page": page,
    "demo": demo,
    "main_job": main_job,
    "upsamplers": upsamplers,
    "upsampler_costs": upsampler_costs,
    "probe": probe,
    "fits": fits,
    "training": training,
    "jbu_parts": jbu_parts,
    "jbu": jbu,
}


def with_tables(text: str) -> str:
    """Regenerate the content between each table's markers in ``text``."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, rest = text.split(start)
        text = before + start + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    """Rewrite or check the tables."""
    old = README.read_text()
    new = with_tables(old)
    if "--check" in sys.argv:
        if old != new:
            sys.exit("README.md: its tables do not match benchmarks/results: run python -m benchmarks.tables")
        return
    README.write_text(new)


if __name__ == "__main__":
    main()
