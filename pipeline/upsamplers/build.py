"""Registry and factory of the upsamplers. To add one, write its file or folder and add a line here."""

import difflib

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.upsamplers.anyup.upsampler import AnyUpUpsampler
from pipeline.upsamplers.bilinear import Bilinear
from pipeline.upsamplers.implicit.upsampler import ImplicitUpsampler
from pipeline.upsamplers.interface import Upsampler
from pipeline.upsamplers.jbu import JBU
from pipeline.upsamplers.lift.upsampler import LiFTUpsampler
from pipeline.upsamplers.multiview.upsampler import MultiviewUpsampler
from pipeline.upsamplers.naf.upsampler import NAFUpsampler
from schemas.upsamplers import UPSAMPLER_OPTIONS, NoOptions

__all__ = ["UPSAMPLERS", "build_upsampler", "describe_upsamplers"]

UPSAMPLERS: dict[str, type[Upsampler]] = {
    upsampler.name: upsampler
    for upsampler in (
        Bilinear,
        JBU,
        LiFTUpsampler,
        AnyUpUpsampler,
        NAFUpsampler,
        MultiviewUpsampler,
        ImplicitUpsampler,
    )
}


def build_upsampler(name: str, weights: str | None, backbone: Backbone, options: object | None = None) -> Upsampler:
    """Build an upsampler in evaluation mode, on the CPU.

    Args:
        name: a name in `UPSAMPLERS`.
        weights: URI of its checkpoint, or None.
        backbone: whose features are upsampled.
        options: an instance of the upsampler's class in `schemas.upsamplers.UPSAMPLER_OPTIONS`; None means defaults.

    Raises:
        JobError: the name is unknown; weights are missing, or given to an upsampler that has none; or the weights or
            options do not match the backbone.
    """
    if name not in UPSAMPLERS:
        near = difflib.get_close_matches(name, UPSAMPLERS)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise JobError(f"--upsampler: got {name!r}, expected one of these.{hint}\n{describe_upsamplers()}")
    kind = UPSAMPLERS[name]
    if weights is None and kind.facts.weights == "required":
        raise JobError(f"--upsampler {name} needs its weights: pass --upsampler-weights; {kind.facts.weights_from}")
    if weights is not None and kind.facts.weights == "none":
        raise JobError(f"--upsampler-weights: got {weights!r}, but {name!r} has no weights. Omit the option.")
    if options is None:
        options = UPSAMPLER_OPTIONS.get(name, NoOptions)()
    return kind.from_options(options, weights, backbone).eval()


def describe_upsamplers() -> str:
    """List every upsampler with its requirements and properties, one per line."""
    lines = []
    for name, upsampler in UPSAMPLERS.items():
        facts = upsampler.facts
        lines.append(
            f"  {name:9} weights {facts.weights}; channels: {facts.channels}; scale: {facts.scale}; guidance: "
            f"{facts.guidance}; PCA: {facts.pca}"
        )
    return "\n".join(lines)
