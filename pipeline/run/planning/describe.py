"""The plan of a job as text for the user."""

import os
from typing import Any

import pyarrow.compute as pc

from pipeline.images.listing.findings import describe_findings
from pipeline.reporting.units import readable_size
from pipeline.run.planning.plan import Plan

__all__ = ["describe"]


def describe(plan: Plan) -> str:
    """Describe a plan: images, store, features, shards, bytes, and the configuration; one line each."""
    layout, config = plan.features, plan.config
    height, width = config.output_size_px
    compact = (
        "" if plan.compact is None else f", from {layout.height}×{layout.width} when read ({config.representation})"
    )
    nbytes = layout.rows * layout.image_nbytes
    labelled = layout.rows - plan.references["label"].null_count
    lines = [
        f"images      {layout.rows:,} {_from(plan)}"
        + (f", {len(plan.class_names):,} classes" if plan.class_names else "")
        + (f", {labelled:,} with a label" if labelled else ", no labels"),
        *describe_findings(plan.findings),
        f"store       {config.store}" + (" (resumed)" if config.continues and plan.stored else ""),
        f"features    {_components(plan)}, {height}×{width}{compact}, {layout.dtype}",
        f"shards      {layout.shards:,} of {layout.shard_rows} images"
        + (f", {len(plan.shards):,} of them by this job ({config.shards})" if config.shards else ""),
        f"bytes       at most {readable_size(nbytes)} (before compression){_guidance(plan)}{_source_size(plan)}",
        *([] if plan.like is None else [f"like        {config.like}: {_taken(plan)}"]),
        "workers     " + ("on Ray" if plan.stages is None else "this process, without Ray (--workers 1 uses Ray)"),
    ]
    for stage, settings in plan.configuration.to_dict().items():
        text = ", ".join(
            f"{name} {_short(value)}" for name, value in settings.items() if name != "name" and value is not None
        )
        lines.append(f"{stage:11} " + " ".join(filter(None, [settings.get("name"), text and f"({text})"])))
    return "\n".join(lines)


def _from(plan: Plan) -> str:
    """Where the images come from; how many of them are new, or will be new to a finished store."""
    if not plan.config.append:
        return f"from {plan.config.images}"
    if plan.waiting:
        return f"of the store, which is finished first; then {plan.waiting:,} new ones from {plan.config.images}"
    new = 0 if plan.growth is None else plan.growth.rows_added
    return f"in the store, {new:,} of them new" if new else "in the store, none of them new"


def _components(plan: Plan) -> str:
    k, share = plan.features.components, plan.configuration.pca.explained_share
    if share is not None and plan.configuration.pca.components is None:
        return f"as many of {plan.channels} components as explain {100 * share:g}% of the variance"
    if k == plan.channels:
        return f"{k} components (all channels: --components N keeps fewer)"
    return f"{k} components of {plan.channels} channels"


def _taken(plan: Plan) -> str:
    """What a plan takes from another store."""
    assert plan.like is not None
    fitted = plan.like.fitted
    steps = [] if fitted.step is None else ["quantization steps"]
    fit = [] if fitted.upsampler is None else [f"the fit of {plan.config.upsampler}"]
    return "its " + ", ".join(["basis", *steps, *fit])


def _guidance(plan: Plan) -> str:
    guided = plan.compact is not None and "guidance" in plan.compact
    return " and a JPEG of {}×{} per image".format(*plan.config.size_px) if guided else ""


def _source_size(plan: Plan) -> str:
    sizes = plan.references["nbytes"]
    known = sizes.null_count == 0 and len(sizes)
    return f"; the images are {readable_size(pc.sum(sizes).as_py())}" if known else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 or os.sep in text else f"{text[:12]}…"
