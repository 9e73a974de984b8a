"""Tables of the main job, its start, the reader, the page and kernels."""

from typing import Any

from benchmarks import rows
from benchmarks.tables import formats


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


def demo() -> str:
    """Seconds of the demo from a fresh clone, and of a repetition."""
    row = rows.read("demo")[-1]
    return (
        f"`make demo` from a clone, with {row['installer']} and an empty package cache: {row['first_s']:.0f} s, "
        f"repeated: {row['again_s']:.0f} s, on {formats.machine(row)} (`python -m benchmarks.jobs.demo`)."
    )


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
            f"| {'GPU' if rows.on_gpu(row) else 'CPU'} | `{row['backbone']}`, {_layers(row['layer'])} "
            f"| {row['upsampler']} | {row['images']:,} "
            f"| {row['images_per_s']:.1f} | {times} "
            f"| {row['store_bytes_per_image'] / 1e6:.2f} | {row['peak_bytes'] / 1e9:.2f} GB |"
        )
    sample = next(iter(latest.values()))
    machines = " and ".join({rows.on_gpu(row): formats.machine(row) for row in latest.values()}.values())
    return (
        f"The main job on {machines}: k = {sample['k']}, {sample['size']} px, int8, 200 COCO photographs, and the same "
        "repeated five or ten times (`python -m benchmarks.jobs.main_job`). Stages overlap on the cores; memory is "
        "that of all processes, including Ray's.\n\n"
    ) + "\n".join(table)


def main_job_cores() -> str:
    """What the main job asks of cores beside a GPU: of each backbone and upsampler, the latest row of most images."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in filter(rows.on_gpu, rows.read("main_job")):
        found = latest.get((row["backbone"], row["upsampler"]))
        if found is None or row["images"] >= found["images"]:
            latest[row["backbone"], row["upsampler"]] = row
    table = [
        "| backbone, upsampler | a core: ms per image to decode / encode | the GPU: ms per image "
        "| cores that would keep it busy | images/s |",
        "|---|---|---|---|---|",
    ]
    for row in latest.values():
        stages = row["stage_ms_per_image"]
        cores, device = stages["decode"] + stages["encode"], stages["backbone"] + stages["upsample"]
        table.append(
            f"| `{row['backbone']}`, {row['upsampler']} | {stages['decode']:.0f} / {stages['encode']:.0f} "
            f"| {device:.2g} | {cores / device:.0f} | {row['images_per_s']:.0f} |"
        )
    sample = next(iter(latest.values()))
    return (
        f"The main job on one {sample['device']} with {sample['cores']} cores: k = {sample['k']}, {sample['size']} px, "
        "int8 (`python -m benchmarks.jobs.main_job`).\n\n"
    ) + "\n".join(table)


def main_job_layers() -> str:
    """The main job with the default layers of a ConvNet, against its layer of stride 16 alone."""
    rates = {_layers(row["layer"]): row for row in rows.read("main_job_layers")}
    both, one = rates["3, 4"], rates["3"]
    return (
        f"With the default layers of EfficientNet-Lite0, 3 and 4, the job takes "
        f"{one['images_per_s'] / both['images_per_s']:.2f} times as long as with layer 3 (−2) alone: {both['images']} "
        f"photographs, one run each in the same hour on {formats.machine(both)}."
    )


def page() -> str:
    """Heat maps of the page."""
    row = rows.read("page")[-1]
    ms = row["ms"]
    return (
        f"At {row['height']}² × {row['k']}, on {formats.machine(row)}: {formats.ms(ms['heat map'])} from the request "
        f"to the heat map, {formats.ms(ms['heat map of another image, not seen before'])} for an image not seen "
        f"before, {formats.ms(ms['ranking'])} to rank {row['sample']} images (`python -m benchmarks.densefeat.page`)."
    )


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
    return (
        f"On {formats.machine(sample)}, medians of interleaved runs (`python -m benchmarks.kernels.jbu`):\n\n"
        + "\n".join(table)
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
        cells = [formats.time_and_memory(row["sides"].get(side), row["batch"]) for side in sides]
        table.append(
            f"| {row['device']} | {row['C']} | {row['batch']} | {row['dtype']}, {row['passes']} "
            f"| {formats.ms(row['floor_ms_per_image'])} | {' | '.join(cells)} |"
        )
    return (
        "Four learned stages, 14×14 → 224×224: ms and peak MB per image, medians of interleaved runs "
        "(`python -m benchmarks.kernels.jbu`). Floor: source and image read once, output written once, at the "
        "bandwidth of a copy in the same run. More sizes are in `benchmarks/results/jbu.jsonl`.\n\n"
    ) + "\n".join(table)


def start() -> str:
    """Seconds of jobs' starts, and their ratios to imports in the same run."""
    row = rows.read("start")[-1]
    commands = row["commands"]
    torch, timm = commands["import torch"], commands["import timm"]
    table = [
        "| command | wall | CPU | wall / `import torch` | CPU / `import torch` | wall / `import timm` "
        "| CPU / `import timm` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in commands.items():
        ratios = [f"{seconds[of] / imported[of]:.2f}" for imported in (torch, timm) for of in ("wall_s", "cpu_s")]
        table.append(f"| {name} | {seconds['wall_s']:.2f} s | {seconds['cpu_s']:.2f} s | {' | '.join(ratios)} |")
    return (
        f"Each in a new process, on {formats.machine(row)}: medians of {row['runs']} interleaved runs "
        f"(`python -m benchmarks.jobs.start`). The job: {row['images']} photographs, EfficientNet-Lite0, k = 64, 224 "
        "px; without Ray, and with one worker of Ray.\n\n"
    ) + "\n".join(table)


def reader() -> str:
    """Reading of rows, boxes and points, and epochs of pixels."""
    row = rows.read("reader")[-1]
    whole = row["reads"]["one row"]
    table = ["| read | wall | CPU | CPU / one row |", "|---|---|---|---|"]
    for name, took in row["reads"].items():
        table.append(f"| {name} | {_both(took)} | {took['cpu_ms'] / whole['cpu_ms']:.2f} |")
    pixels = row["epochs"]["PixelFeatures"]
    table += ["", f"| epoch of {row['images']} images | wall | CPU | CPU / `PixelFeatures` |", "|---|---|---|---|"]
    for name, took in row["epochs"].items():
        table.append(f"| {name} | {_both(took)} | {took['cpu_ms'] / pixels['cpu_ms']:.2f} |")
    return (
        f"From a local folder, in one process on {formats.machine(row)}: {row['height']}×{row['width']}, k = "
        f"{row['k']}, int8, EfficientNet-Lite0. Medians of interleaved calls "
        f"(`python -m benchmarks.densefeat.reader`). An epoch has {row['pixels']:,} labelled pixels an image, or "
        "all.\n\n"
    ) + "\n".join(table)


def _both(took: dict[str, float]) -> str:
    return " | ".join(formats.ms(took[name]) for name in ("ms", "cpu_ms"))


def _layers(layer: int | list[int]) -> str:
    return str(layer) if isinstance(layer, int) else ", ".join(map(str, layer))
