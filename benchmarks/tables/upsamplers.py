"""Tables of upsamplers: properties, costs, quality, and what training gains."""

import statistics
from typing import Any

from benchmarks import rows
from benchmarks.tables import formats
from benchmarks.upsamplers.jbu_settings import SETTINGS, work
from pipeline.evaluate.bootstrap import Estimate
from pipeline.upsamplers.build import UPSAMPLERS


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
    sample = latest["jbu", 224]
    table = [
        "| upsampler | 224 px | 448 px | 896 px | all 384 channels, 224 px | 448 px | plain, 224 px | 448 px |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in latest):
        measured = [(latest[name, size], "k") for size in (224, 448, 896)]
        measured += [(latest[name, size], side) for side in ("all channels", "plain") for size in (224, 448)]
        cells = [
            f"{formats.ms(row['ms'][side])}, {row['peak_bytes'][side] / 1e6:,.0f} MB" if side in row["ms"] else ""
            for row, side in measured
        ]
        table.append(f"| {name}{formats.elsewhere(measured[0][0], sample)} | {' | '.join(cells)} |")
    return (
        f"From ViT-S/14's 384 channels to k = 64 at the image's size, one image, one thread of "
        f"{formats.machine(sample)} (`python -m benchmarks.upsamplers.compared`). Plain: all "
        "channels, AnyUp with its full attention matrix, then PCA. Weights are random: no cost depends on them.\n\n"
    ) + "\n".join(table)


def jbu_settings() -> str:
    """The probe on training-free JBU with other settings, and their work."""
    latest = {(row["backbone"], row["settings"]): row for row in rows.read("jbu_settings")}
    backbones = sorted({backbone for backbone, _ in latest}, key=_ORDER.index)
    sample = next(iter(latest.values()))
    figures = (("miou_difference", "mean IoU"), ("border_accuracy_difference", "near a border"))
    heads = [f"{backbone}: {words}" for backbone in backbones for _, words in figures]
    table = [f"| radii of the stages | work | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for settings in dict.fromkeys(settings for _, settings in latest if settings != "bilinear"):
        of_backbones = [latest[backbone, settings] for backbone in backbones]
        share = work(SETTINGS[settings]) / work(SETTINGS["3"])
        cells = [formats.gain(Estimate.of(row[name])) for row in of_backbones for name, _ in figures]
        table.append(f"| {settings} | {share:.2f} | {' | '.join(cells)} |")
    return (
        "Gain over `bilinear` in a linear probe, with 95% intervals, bold where they exclude zero: coco200's training "
        f"half, {sample['train']} photographs to train and {sample['val']} others to evaluate, k = 64. σ_spatial is "
        "half of the radius and σ_range 0.1 where nothing else is said. Work: products of all stages, 14×14 to "
        "224×224, over those of the first row "
        "(`python -m benchmarks.upsamplers.jbu_settings`).\n\n"
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
            f"| {' | '.join(map(formats.seconds, _fit_seconds(row)))} |"
        )
    sample = next(iter(latest.values()))
    photos, step = max(row["photos"] for row in latest.values()), rows.read("implicit_steps")[-1]
    return (
        f"Squared error on 20 views of each of {photos} photographs (coco200's validation half, 224 px, k = 64) that "
        f"no fit has used, as a share of their variance. Seconds of one core of {formats.machine(sample)}, for the fit "
        "without the backbone's passes, and for these passes (`python -m benchmarks.upsamplers.implicit`, "
        "`benchmarks.upsamplers.implicit_featup`). FeatUp's networks are evaluated through the downsampler fitted "
        "with them if that gives a lower error. A step takes "
        f"{step['plain_step_s']:.2g} s implemented as in FeatUp, {step['step_s']:.2g} s here, and "
        f"{step['step_of_four_s']:.2g} s for four images together.\n\n"
    ) + "\n".join(table)


def training() -> str:
    """Error on held-out views before and after training, and of upsamplers without training."""
    latest = {row["recipe"]: row for row in rows.read("training")}
    sample = next(iter(latest.values()))
    table = [
        "| recipe | steps | s per step, backbone's share | measured on | before | after | bilinear "
        "| training-free jbu |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, row in latest.items():
        step = _step(row["step_s"])
        for backbone, own in rows.by_backbone(row["held_out"]).items():
            trained = recipe.split()[0]
            seen = "" if own[0]["trained_on"] == "1" else ", not trained on"
            errors = [own[0][f"{trained}_relative_error"], own[-1][f"{trained}_relative_error"]]
            errors += [own[0][f"{other}_relative_error"] for other in ("bilinear", "training_free")]
            cells = " | ".join(f"{float(error):.3f}" for error in errors)
            table.append(
                f"| {recipe}{formats.elsewhere(row, sample)} | {own[-1]['step']} | {step} "
                f"| `{backbone}`{seen} | {cells} |"
            )
    return (
        "Squared error on views of photographs of coco200's validation half, not used in training, as a share of their "
        f"variance; trained on the other 100, on one core of {formats.machine(sample)} "
        "(`python -m benchmarks.train.training`). LiFT and a copy of solutions run the backbone only in the first "
        "epochs, then they use what they kept.\n\n"
    ) + "\n".join(table)


def _step(seconds: dict[str, float]) -> str:
    """Seconds of a step, and the backbone's share of them."""
    total = sum(seconds.values())
    return f"{total:.1f}, {seconds['backbone'] / total:.0%}"


def _errors(row: dict[str, Any], few: int) -> tuple[Any, float]:
    """Mean error on all photographs (None if measured on few), and on ``few`` of them, spread evenly."""
    if "errors" in row:
        return row["held_out_error"], statistics.mean(row["errors"][:: len(row["errors"]) // few])
    return None, min(row["held_out_error"], row["own_error"])


def _fit_seconds(row: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the fit, and of the backbone's passes over its views."""
    return row["fit_s"], row["extraction_s"]


METRICS = ("miou", "border_accuracy")


def quality() -> str:
    """A linear probe and held-out views, for every method and backbone, at 224 px and with 64 components."""
    latest = _quality(224, 64)
    table = [
        "| backbone | features | passes | mean IoU | − bilinear | near a border | − bilinear | held-out views |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (backbone, method), row in latest.items():
        table.append(f"| {backbone} | {method} | {row['passes']} | {_qualities(row)} |")
    runs, photos = (
        " or ".join(map(str, dict.fromkeys(row[name] for row in latest.values()))) for name in ("runs", "photos")
    )
    return (
        "coco200, 224 px, k = 64 (`python -m benchmarks.upsamplers.quality`). A linear probe of the 20 most "
        "frequent classes: mean IoU, and accuracy within 3 px of a border between classes, with the paired difference "
        "to `bilinear` and its 95% interval, bold where that excludes zero. "
        f"{runs} classifiers, each trained on {photos} photographs drawn with replacement and evaluated on as many "
        "others, which the intervals resample. Held-out views: squared error on 20 views of each "
        "of these others, as a share of their variance, ± half of the 95% interval's width. Passes: of the backbone, "
        "per image; the image at 2× has four times the pixels.\n\n"
    ) + "\n".join(table)


def quality_larger() -> str:
    """The same with all channels, and for larger images."""
    table = [
        "| | backbone | features | mean IoU | − bilinear | near a border | − bilinear | held-out views |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured = [*_quality(224, None).values(), *_quality(448, 64).values()]
    for row in measured:
        setting = f"{row['k']} channels, 224 px" if row["size"] == 224 else "448 px"
        table.append(f"| {setting} | {row['backbone']} | {row['method']} | {_qualities(row)} |")
    photos = " or ".join(map(str, dict.fromkeys(row["photos"] for row in measured)))
    return (
        f"As above, {photos} photographs each: with all channels of the backbone at 224 px, and with 64 components at "
        "448 px (`python -m benchmarks.upsamplers.quality --components 10000`, `--size 448`).\n\n"
    ) + "\n".join(table)


def _qualities(row: dict[str, Any]) -> str:
    """Cells of a row: each metric with its difference to bilinear, and the error on held-out views."""
    cells = []
    for metric in METRICS:
        value, difference = Estimate.of(row[metric]), Estimate.of(row[f"{metric}_difference"])
        cells += [f"{value.mean:.3f}", "" if row["method"] == "bilinear" else formats.gain(difference)]
    error = Estimate.of(row["held_out_error"])
    return " | ".join([*cells, f"{error.mean:.3f} ± {error.half_width:.3f}"])


def sizes() -> str:
    """Error of a model of the backbone that was fitted at another size, one line."""
    row = rows.read("sizes")[-1]
    return (
        f"Fitted at {row['fitted_at']} pixels and used at {row['used_at']}: error on held-out views "
        f"{row['carried']:.3f}; fitted at {row['used_at']}: {row['fitted']:.3f}; `bilinear`: {row['bilinear']:.3f} "
        f"({row['backbone']}, {row['photos']} photographs, not smoothed; `python -m benchmarks.upsamplers.sizes`)."
    )


def held_out_of_jbu() -> str:
    """Error of the default on held-out views beside bilinear's, one line."""
    latest = _quality(224, 64)
    words = [
        f"{latest[name, 'jbu']['held_out_error']['mean']:.3f} against "
        f"{latest[name, 'bilinear']['held_out_error']['mean']:.3f} on {name}"
        for name in dict.fromkeys(backbone for backbone, _ in latest)
    ]
    return f"Error on held-out views, `jbu` against `bilinear`: {', '.join(words)}."


def _quality(size: int, components: int | None) -> dict[tuple[str, str], dict[str, Any]]:
    """The latest row of each backbone and method, in the order of the benchmark; None: with all channels."""
    own = [
        row for row in rows.read("quality")
        if row["size"] == size and (row["k"] == components if components else row["k"] != 64)
    ]  # fmt: skip
    latest = {(row["backbone"], row["method"]): row for row in own}
    return {key: latest[key] for key in sorted(latest, key=lambda key: _ORDER.index(key[0]))}


_ORDER = ("lite0", "vit-ti", "vit")  # of backbones in tables
