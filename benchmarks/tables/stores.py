"""Tables of stores: bytes and error of each quality."""

from typing import Any

from benchmarks import rows
from benchmarks.tables import formats

_BACKBONES = {"lite0": "EfficientNet-Lite0", "vit": "ViT-S/14"}
_OPTIONS = {
    "high": "`--quality high`, the default",
    "balanced": "`--quality balanced`",
    "small": "`--quality small`",
    "compact": "`--represent compact`",
}


def encoding() -> str:
    """Bytes, error and costs of each quality: the latest row of each."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {
        (row["k"], row["quality"], row["backbone"]): row for row in rows.read("encoding")
    }
    names = list(dict.fromkeys(row["backbone"] for row in latest.values()))
    sizes = sorted({row["k"] for row in latest.values()})
    sample = next(iter(latest.values()))
    table = ["| k | | bytes | of float16 | cosine: mean | worst percentile | encode | decode |", "|---" * 8 + "|"]
    for k in sizes:
        for quality, option in _OPTIONS.items():
            of_quality = [latest[k, quality, name] for name in names]
            cells = [
                " / ".join(f"{row['nbytes'] / 1e6:.2g}" for row in of_quality) + " MB",
                " / ".join(f"1/{row['of_float16']:.0f}" for row in of_quality),
                " / ".join(f"{row['cosine']['mean']:.4f}" for row in of_quality),
                " / ".join(f"{row['cosine']['p1']:.3f}" for row in of_quality),
                *(
                    formats.ms(1e3 * sum(row[name] for row in of_quality) / len(of_quality))
                    for name in ("encode_s", "decode_s")
                ),
            ]
            table.append(f"| {k} | {option} | " + " | ".join(cells) + " |")
    return (
        f"{' / '.join(_BACKBONES[name] for name in names)}: training-free JBU at 224×224, {sample['photos']} "
        "photographs of COCO. Cosine similarity to the features before they are encoded. Encode and decode an image, to"
        f" or from all values at 224×224: one core of {formats.machine(sample)} "
        "(`python -m benchmarks.store.encoding`).\n\n"
    ) + "\n".join(table)
