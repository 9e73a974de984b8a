"""The upsamplers a job can name, and how one is built from its configuration."""

import difflib

from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.provenance import check_pairing
from pipeline.upsamplers.anyup.upsampler import AnyUpUpsampler
from pipeline.upsamplers.images import check_images, resize
from pipeline.upsamplers.implicit.schedule import Schedule
from pipeline.upsamplers.implicit.upsampler import ImplicitUpsampler
from pipeline.upsamplers.interface import Facts, LinearUpsampler, Projected, Upsampler
from pipeline.upsamplers.jbu import JBU, UNIVERSAL
from pipeline.upsamplers.lift.upsampler import LiFTUpsampler
from pipeline.upsamplers.multiview.upsampler import MultiviewUpsampler
from schemas.options import UpsampleConfig

__all__ = [
    "JBU",
    "UPSAMPLERS",
    "AnyUpUpsampler",
    "Bilinear",
    "ImplicitUpsampler",
    "LiFTUpsampler",
    "MultiviewUpsampler",
    "Projected",
    "Upsampler",
    "build_configured",
    "build_upsampler",
    "describe_upsamplers",
]


class Bilinear(LinearUpsampler):
    """Bilinear interpolation, align_corners=False; the baseline. The image is not looked at."""

    name = "bilinear"
    facts = Facts(weights="none", channels="any", scale="any", guidance="nothing", pca="exact: in front")

    def forward(self, low: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """As `LinearUpsampler.forward`."""
        check_images(low, images, size)
        return resize(low, size)


UPSAMPLERS: dict[str, type[Upsampler]] = {
    upsampler.name: upsampler
    for upsampler in (Bilinear, JBU, LiFTUpsampler, AnyUpUpsampler, MultiviewUpsampler, ImplicitUpsampler)
}


def build_configured(config: UpsampleConfig, backbone: Backbone) -> Upsampler:
    """`build_upsampler` with all that a job's configuration says of it."""
    return build_upsampler(
        config.upsampler,
        config.upsampler_weights,
        backbone,
        lift_iterations=config.lift_iterations,
        views=config.views,
        fit_steps=config.fit_steps,
        regularisation=config.regularisation,
    )


def build_upsampler(
    name: str,
    weights: str | None,
    backbone: Backbone,
    *,
    lift_iterations: int = 1,
    views: int | None = None,
    fit_steps: int | None = None,
    regularisation: float | None = None,
) -> Upsampler:
    """Build the upsampler a job's configuration names, in evaluation mode, on the CPU.

    Args:
        name: a name in `UPSAMPLERS`.
        weights: URI of its checkpoint, or None; of ``jbu`` also "universal", those that come with this.
        backbone: whose features it is to upsample.
        lift_iterations: of ``lift``.
        views: of ``multiview`` and ``implicit``; None: those of its weights, and its default.
        fit_steps: of ``implicit``, at most; None: its default.
        regularisation: of ``multiview``; None: that of its weights.

    Raises:
        JobError: no such upsampler; weights for one that has none, or none for one that needs them; weights that do
            not fit the backbone.
    """
    if name not in UPSAMPLERS:
        near = difflib.get_close_matches(name, UPSAMPLERS)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise JobError(f"--upsampler: got {name!r}, expected one of these.{hint}\n{describe_upsamplers()}")
    kind = UPSAMPLERS[name]
    if weights is None:
        if kind.facts.weights == "required":
            fitted = kind is MultiviewUpsampler
            where = "make them with jobs/fit_downsampler.py" if fitted else "the README says where from"
            raise JobError(f"--upsampler {name} needs its weights: give --upsampler-weights; {where}")
        if kind is ImplicitUpsampler:
            return ImplicitUpsampler(backbone, Schedule.asked_for(views=views, steps=fit_steps)).eval()
        return kind().eval()
    if kind is JBU and weights == UNIVERSAL:
        return JBU.universal().eval()
    if kind.facts.weights == "none":
        raise JobError(f"--upsampler-weights: got {weights!r} for {name!r}, which has no weights. Leave them out.")
    if kind is MultiviewUpsampler:
        return MultiviewUpsampler.from_weights(weights, backbone, views=views, regularisation=regularisation)
    check_pairing(weights, name, backbone)
    if kind is LiFTUpsampler:
        patch = backbone.reduction
        return LiFTUpsampler.from_weights(weights, backbone.num_chs, patch=patch, iterations=lift_iterations)
    return (
        AnyUpUpsampler.from_weights(weights) if kind is AnyUpUpsampler else JBU.from_weights(weights, backbone.num_chs)
    )


def describe_upsamplers() -> str:
    """What there is, what each needs and gives: for a person, a line each."""
    lines = []
    for name, upsampler in UPSAMPLERS.items():
        facts = upsampler.facts
        lines.append(
            f"  {name:9} weights {facts.weights}; channels: {facts.channels}; scale: {facts.scale}; looks at: "
            f"{facts.guidance}; PCA: {facts.pca}"
        )
    return "\n".join(lines)
