"""A store in words and figures: what ``densefeat info`` and ``densefeat card`` print."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from densefeat import __version__
from densefeat.page.listing import without_features
from densefeat.store import FeatureStore

__all__ = ["MADE", "card", "facts_of", "on_one_line"]

MADE = "# Made by densefeat"  # the second line of a card begins with it

_DIGEST = 64  # characters of a SHA-256 in hex
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
          (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (float("inf"), "n>1B"))  # fmt: skip
_CARD = """\
---
{made} {version}. Without this line, densefeat leaves the text as it is.
tags:
- densefeat
- dense-features
- zarr
task_categories:
- image-feature-extraction
size_categories:
- {size}
---

# Dense features of {rows} images: {k} × {height} × {width} of {backbone}

{ok} of {rows} images have features: {k} components at {height} × {width} pixels per image, {stored}.

```python
from densefeat import FeatureStore  # pip install densefeat

store = FeatureStore("…")  # the place of this folder: a path, s3://…, https://…
features = store.read(store.rows_with_features[0])  # [{k}, {height}, {width}] float32
```

## How they were made

{made_table}

Stores with the same configuration hash were computed in the same way. `densefeat info` prints the whole configuration.

## Images without features

{missing}

## Terms

{terms}
"""


def facts_of(store: FeatureStore) -> dict[str, Any]:
    """What ``densefeat info --json`` prints; sizes are in bytes."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for group in sorted(without_features(store.index), key=lambda group: group["first"]):
        key, error = store.index["key"][group["first"]].as_py(), group["error"]
        examples.setdefault(group["status"], f"{key}: {error}" if error else key)
        counts[group["status"]] += group["rows"]
    counts["ok"] = len(store) - counts.total()
    return {
        "uri": store.uri,
        "rows": len(store),
        "statuses": dict(counts.most_common()),
        "examples": examples,
        "shape": store.shape,
        "dtype": store.layout.dtype,
        "representation": "dense" if store.compact is None else "compact",
        "stored_shape": store.layout.image_shape,
        "nbytes": store.nbytes,
        "uncompressed_nbytes": counts["ok"] * store.uncompressed_nbytes,
        "explained_variance": store.attributes.get("explained_variance"),
        "class_names": store.class_names,
        "appended": store.attributes.get("appended", []),
        "configuration": store.attributes["configuration"],
        "configuration_hash": store.attributes["configuration_hash"],
        "backbone_license": store.attributes.get("backbone_license"),
        "versions": store.attributes.get("versions"),
    }


def on_one_line(settings: Any) -> str:
    """Settings as ``name value`` pairs; digests are shortened."""
    if not isinstance(settings, dict):
        return str(settings)
    values = {name: str(value) for name, value in settings.items() if value is not None}
    shown = {
        name: f"{text[:12]}…" if len(text) == _DIGEST and text.isalnum() else text for name, text in values.items()
    }
    return ", ".join(f"{name} {text}" for name, text in shown.items())


def card(store: FeatureStore) -> str:
    """A card of a store in Markdown, with the front matter of a dataset card of the Hugging Face Hub.

    Raises:
        StoreError: the store is damaged.
        OSError: the storage failed.
    """
    facts = facts_of(store)
    k, height, width = facts["shape"]
    low = "" if store.compact is None else f", compact at {' × '.join(map(str, store.layout.image_shape[1:]))}"
    statuses = dict(facts["statuses"])
    ok = statuses.pop("ok", 0)
    rows = [(f"`{status}`", f"{count:,}") for status, count in statuses.items()]
    return _CARD.format(
        made=MADE,
        version=__version__,
        size=next(name for limit, name in _SIZES if len(store) < limit),
        rows=f"{len(store):,}",
        ok=f"{ok:,}",
        k=k,
        height=height,
        width=width,
        backbone=facts["configuration"]["backbone"].get("name", "a backbone"),
        stored=f"{facts['dtype']}{low}, {facts['nbytes'] / 1e6:,.1f} MB",
        made_table=_table(("", ""), _made(facts)),
        missing=_table(("status", "images"), rows) if rows else "None.",
        terms=_terms(facts["backbone_license"]),
    )


def _made(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for part, settings in facts["configuration"].items():
        yield part, on_one_line(settings)
    for source in facts["appended"]:
        yield "appended", on_one_line(source)
    if facts["explained_variance"] is not None:
        yield "variance kept", f"{facts['explained_variance']:.1%}"
    yield "classes", f"{len(facts['class_names']):,}"
    yield "configuration hash", f"`{facts['configuration_hash']}`"
    yield "versions", on_one_line(facts["versions"])


def _terms(backbone: str | None) -> str:
    weights = (
        "The licence of the backbone's weights is not known to the store"
        if backbone is None
        else f"The backbone's published weights are under `{backbone}`, as timm names it"
    )
    return (
        f"Features are derived from images and from weights, so the terms of both apply. {weights}. Add those of the "
        "images, and of the upsampler's weights if it has any."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(head), *map(tuple, rows)]
    cells = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines]
    return "\n".join([f"| {cells[0]} |", f"|{'---|' * len(lines[0])}", *(f"| {line} |" for line in cells[1:])])
