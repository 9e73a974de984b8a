"""The upsamplers a job can name, and how one is built from its configuration."""

import difflib

from torch import Tensor

from pipeline.backbone import Backbone
from pipeline.errors import JobError
from pipeline.upsample_anyup import AnyUpUpsampler
from pipeline.upsample_interface import Facts, LinearUpsampler, Projected, Upsampler, check_images, resize
from pipeline.upsample_jbu import JBU
from pipeline.upsample_lift import LiFTUpsampler

__all__ = [
    "JBU",
    "UPSAMPLERS",
    "AnyUpUpsampler",
    "Bilinear",
    "LiFTUpsampler",
    "Projected",
    "Upsampler",
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
    upsampler.name: upsampler for upsampler in (Bilinear, JBU, LiFTUpsampler, AnyUpUpsampler)
}


def build_upsampler(name: str, weights: str | None, backbone: Backbone, *, lift_iterations: int = 1) -> Upsampler:
    """Build the upsampler a job's configuration names, in evaluation mode, on the CPU.

    Args:
        name: a name in `UPSAMPLERS`.
        weights: URI of its checkpoint, or None.
        backbone: whose features it is to upsample.
        lift_iterations: of ``lift``.

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
            raise JobError(
                f"--upsampler {name} needs its weights: give --upsampler-weights; the README says where from"
            )
        return kind().eval()
    if kind.facts.weights == "none":
        raise JobError(f"--upsampler-weights: got {weights!r} for {name!r}, which has no weights. Leave them out.")
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
