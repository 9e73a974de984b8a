"""Tables of upsamplers: properties, costs, quality, and what training gains."""

import statistics
from typing import Any

from benchmarks import rows
from benchmarks.bootstrap import Estimate
from benchmarks.tables import formats
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
        table.append(f"| {name} | {' | '.join(cells)} |")
    sample = latest["jbu", 224]
    return (
        f"From ViT-S/14's 384 channels to k = 64 at the image's size, one image, one thread of "
        f"{formats.machine(sample)} (`python -m benchmarks.upsamplers.compared`). Plain: all "
        "channels, AnyUp with its full attention matrix, then "
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
        f"variance; trained on the other 100, on one core of {formats.machine(sample)} "
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


def probe() -> str:
    """Accuracy of a linear classifier on the features of each upsampler, with 95% intervals."""
    latest = _probes()
    metrics = ("miou", "accuracy", "border_accuracy")
    table = [
        "| backbone | upsampler | mean IoU | − bilinear | accuracy | − bilinear | near a border | − bilinear |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (backbone, method), row in latest.items():
        numbers = []
        for metric in metrics:
            value, difference = Estimate.of(row[metric]), Estimate.of(row[f"{metric}_difference"])
            numbers += [
                f"{value.mean:.3f} ± {value.half_width:.3f}",
                "" if method == "bilinear" else formats.gain(difference),
            ]
        table.append(f"| {backbone} | {method} | {' | '.join(numbers)} |")
    row = next(iter(latest.values()))
    return (
        f"A linear probe of the 20 most frequent classes of coco200, 224 px, k = {row['k']} "
        f"(`python -m benchmarks.upsamplers.quality`): mean ± half of the 95% interval's width, and the paired "
        f"difference to `bilinear` with its 95% interval, bold where that excludes zero. {row['runs']} classifiers, "
        f"each trained on {row['photos']} photographs drawn with replacement and evaluated on {row['photos']} others, "
        "which the intervals resample. Near: within 3 px.\n\n"
    ) + "\n".join(table)


def choice() -> str:
    """Weights, cost and quality of each upsampler, in short."""
    cost = {row["upsampler"]: formats.ms(row["ms"]["k"]) for row in rows.read("upsamplers") if row["size"] == 224}
    fits = {(row["backbone"], row["method"]): row for row in rows.read("implicit") if not rows.on_gpu(row)}
    multiview, implicit = (
        formats.seconds(sum(_fit_seconds(fits["vit", method])))
        for method in ("multiview, 21 views", "implicit, default schedule")
    )
    universal = cost["jbu, FeatUp's weights"]
    slow, few = fits["vit", "implicit, default schedule"], fits["vit", "implicit, default schedule"]["photos"]
    slow_error = _errors(slow, few)[1] / _errors(fits["vit", "bilinear"], few)[1]
    table = [
        "| `--upsampler` | weights | cost per image | error on held-out views | gain in a linear probe's mean IoU |",
        "|---|---|---|---|---|",
        f"| `bilinear` | none | {cost['bilinear']} | 1 / 1 | 0 / 0 |",
        f"| `jbu`, the default | none | {cost['jbu']} | {_held_out('jbu')} | {_gains('jbu')} |",
        f"| `jbu` with weights `universal` | included | {universal} "
        f"| {_universal_held_out()} | {_gains('jbu, universal')} |",
        f"| `multiview` | fitted once per backbone | {multiview} | {_held_out('multiview, 21 views')} "
        f"| {_gains('multiview')} |",
        f"| `lift`, `anyup` | published | {cost['lift']}, {cost['anyup']} | | |",
        f"| `implicit` | none | {implicit} | not measured / {slow_error:.2f} | |",
    ]
    return (
        "EfficientNet-Lite0 / DINOv2's ViT-S/14, 224 px, k = 64. Cost: one CPU core, with the ViT's features, without "
        "its first pass. Error: as a share of `bilinear`'s, lower is better; for `universal`, on views that its "
        "training holds out. Gain: over `bilinear`, with its 95% interval, bold where that excludes zero.\n\n"
    ) + "\n".join(table)


def held_out_of_jbu() -> str:
    """Error of the default on held-out views beside bilinear's, one line."""
    fits = {(row["backbone"], row["method"]): row for row in rows.read("implicit") if not rows.on_gpu(row)}
    lite0, vit = (
        f"{fits[name, 'jbu']['held_out_error']:.3f} against {fits[name, 'bilinear']['held_out_error']:.3f}"
        for name in ("lite0", "vit")
    )
    return f"Error on [held-out views](#held-out-views), `jbu` against `bilinear`: {lite0} on Lite0, {vit} on ViT-S/14."


def _probes() -> dict[tuple[str, str], dict[str, Any]]:
    """The latest row of each backbone and method, Lite0 first."""
    latest = {(row["backbone"], row["method"]): row for row in rows.read("probe")}
    return {key: latest[key] for key in sorted(latest, key=lambda key: key[0])}


def _gains(method: str) -> str:
    """Gain in mean IoU for both backbones."""
    latest = _probes()
    return " / ".join(formats.gain(Estimate.of(latest[name, method]["miou_difference"])) for name in ("lite0", "vit"))


def _held_out(method: str) -> str:
    """Error on held-out views as a share of bilinear's, for both backbones."""
    fits = {(row["backbone"], row["method"]): row for row in rows.read("implicit") if not rows.on_gpu(row)}
    shares = [
        fits[name, method]["held_out_error"] / fits[name, "bilinear"]["held_out_error"] for name in ("lite0", "vit")
    ]
    return " / ".join(f"{share:.2f}" for share in shares)


def _universal_held_out() -> str:
    """The same for the weights `universal`, as measured at the end of their training."""
    (row,) = [row for row in rows.read("training") if row["recipe"] == "jbu on lite0"]
    own = rows.by_backbone(row["held_out"])
    last = [own[name][-1] for name in ("tf_efficientnet_lite0@3", "vit_small_patch14_dinov2.lvd142m@10")]
    return " / ".join(
        f"{float(seen['jbu_relative_error']) / float(seen['bilinear_relative_error']):.2f}" for seen in last
    )
