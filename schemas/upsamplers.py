"""Options of the upsamplers, one dataclass each. All are flat on the command line; comments are the help texts.

For an upsampler with options of its own, add a dataclass here, a line in `UPSAMPLER_OPTIONS` and a base class of
`UpsamplerOptions`. An upsampler without options needs nothing here.
"""

from dataclasses import dataclass
from typing import Literal

from schemas.checks import at_least, check_method_options, own_options

__all__ = [
    "UPSAMPLER_OPTIONS",
    "ImplicitOptions",
    "JBUOptions",
    "LiFTOptions",
    "MultiviewOptions",
    "NoOptions",
    "UpsamplerOptions",
]


_MOST_STRENGTH = 1000.0  # of multiview's smoothing: above 100 its solver's steps limit what it does


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of an upsampler that has none."""


@dataclass(frozen=True, kw_only=True)
class _KernelOptions:
    """Options shared by the upsamplers with training-free JBU kernels."""

    # jbu without weights: kernels of the first two stages; multiview: of the first one after its solver. "wide"
    # averages more within the regions of the image: better for classifying pixels, worse for finding corresponding
    # points and in fidelity to the backbone. If omitted, "narrow".
    jbu_kernels: Literal["narrow", "wide"] | None = None


@dataclass(frozen=True, kw_only=True)
class JBUOptions(_KernelOptions):
    """Options of ``jbu``."""


@dataclass(frozen=True, kw_only=True)
class LiFTOptions:
    """Options of ``lift``."""

    # lift: number of times to double the resolution.
    lift_iterations: int = 1

    def __post_init__(self) -> None:
        """Check the range."""
        at_least("--lift-iterations", self.lift_iterations, 1)


@dataclass(frozen=True, kw_only=True)
class _ViewsOptions:
    """Options shared by the upsamplers that fit views of each image."""

    # multiview, implicit: views per image to fit; if omitted, 9 for multiview, or the number that its weights were
    # fitted with, and 100 for implicit. FeatUp's own schedule is --upsampler implicit --views 3000 --fit-steps 1200.
    views: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        at_least("--views", self.views, 2)


@dataclass(frozen=True, kw_only=True)
class MultiviewOptions(_ViewsOptions, _KernelOptions):
    """Options of ``multiview``."""

    # multiview: how strongly the solver smooths between neighbours of similar colour; if omitted, it is fitted, or
    # the value in the weights.
    regularisation: float | None = None
    # multiview: how strongly to smooth the solution within the regions of the image. More, up to about 100, is better
    # for a linear probe, 0 comes closest to the views; if omitted, 10, or the value in the weights.
    smoothing: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for option, strength in (("--regularisation", self.regularisation), ("--smoothing", self.smoothing)):
            at_least(option, strength, 0)
            if strength is not None and strength > _MOST_STRENGTH:
                raise ValueError(
                    f"{option} must be at most {_MOST_STRENGTH:.0f}, as more changes nothing: got {strength}"
                )


@dataclass(frozen=True, kw_only=True)
class ImplicitOptions(_ViewsOptions):
    """Options of ``implicit``."""

    # implicit: maximum number of steps. It stops earlier when held-out views no longer improve, except with FeatUp's
    # own schedule.
    fit_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        at_least("--fit-steps", self.fit_steps, 1)


# Options of each upsampler that has any, by its name.
UPSAMPLER_OPTIONS: dict[str, type] = {
    "jbu": JBUOptions,
    "lift": LiFTOptions,
    "multiview": MultiviewOptions,
    "implicit": ImplicitOptions,
}


@dataclass(frozen=True, kw_only=True)
class _ChosenUpsampler:
    """The chosen upsampler and its weights."""

    # Upsampler: "bilinear", "jbu", "lift", "anyup", "naf", "multiview" or "implicit". An unknown name lists all with
    # their requirements.
    upsampler: str = "jbu"
    # Checkpoint of the upsampler. Required for lift, anyup and naf. jbu accepts FeatUp's weights and those of
    # jobs/train_upsampler.py; without weights it is training-free. multiview accepts a file from
    # jobs/fit_pooling.py; without one, the job fits its model of the backbone to the images.
    upsampler_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class UpsamplerOptions(JBUOptions, LiFTOptions, MultiviewOptions, ImplicitOptions, _ChosenUpsampler):
    """The chosen upsampler, and the options of all upsamplers; those of the others must have their defaults."""

    def __post_init__(self) -> None:
        """Check the options of every upsampler; reject non-default options of upsamplers that were not chosen."""
        check_method_options(self, self.upsampler, UPSAMPLER_OPTIONS)

    @property
    def upsampler_options(self) -> object:
        """The options of the chosen upsampler, as an instance of its class in `UPSAMPLER_OPTIONS`."""
        return own_options(self, UPSAMPLER_OPTIONS.get(self.upsampler, NoOptions))
