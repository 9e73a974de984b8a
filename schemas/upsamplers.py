"""The options of the upsamplers, a dataclass each. All are flat on the command line; comments are the help texts.

An upsampler with options of its own has its dataclass here, a line in `UPSAMPLER_OPTIONS`, and is a base class of
`UpsamplerOptions`. One without needs nothing here.
"""

from dataclasses import dataclass

from schemas.checks import at_least, check_method_options, own_options

__all__ = [
    "UPSAMPLER_OPTIONS",
    "ImplicitOptions",
    "LiFTOptions",
    "MultiviewOptions",
    "NoOptions",
    "UpsamplerOptions",
]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of an upsampler that has none."""


@dataclass(frozen=True, kw_only=True)
class LiFTOptions:
    """Options of ``lift``."""

    # How often lift doubles the resolution.
    lift_iterations: int = 1

    def __post_init__(self) -> None:
        """Check the range."""
        at_least("--lift-iterations", self.lift_iterations, 1)


@dataclass(frozen=True, kw_only=True)
class _ViewsOptions:
    """Options of the upsamplers that fit views of each image."""

    # Views of each image that multiview or implicit fits; if omitted, as many as multiview's weights were fitted with,
    # and 100 for implicit. FeatUp's own schedule is --upsampler implicit --views 3000 --fit-steps 1200.
    views: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        at_least("--views", self.views, 2)


@dataclass(frozen=True, kw_only=True)
class MultiviewOptions(_ViewsOptions):
    """Options of ``multiview``."""

    # How strongly multiview smooths between neighbours of like colour; if omitted, as its weights say.
    regularisation: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        at_least("--regularisation", self.regularisation, 0)


@dataclass(frozen=True, kw_only=True)
class ImplicitOptions(_ViewsOptions):
    """Options of ``implicit``."""

    # Most steps of implicit. It stops earlier when held-out views no longer improve, except with FeatUp's own schedule.
    fit_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        at_least("--fit-steps", self.fit_steps, 1)


# Options of each upsampler that has any, by its name.
UPSAMPLER_OPTIONS: dict[str, type] = {
    "lift": LiFTOptions,
    "multiview": MultiviewOptions,
    "implicit": ImplicitOptions,
}


@dataclass(frozen=True, kw_only=True)
class _ChosenUpsampler:
    """Which upsampler, and its weights."""

    # Upsampler: "bilinear", "jbu", "lift", "anyup", "multiview" or "implicit". An unknown name lists all of them and
    # what each needs.
    upsampler: str = "jbu"
    # Checkpoint of the upsampler. Required for lift, anyup and multiview (made by jobs/fit_pooling.py). jbu takes
    # FeatUp's weights, or "universal", bundled weights that work with any backbone; without weights it needs no
    # training.
    upsampler_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class UpsamplerOptions(LiFTOptions, MultiviewOptions, ImplicitOptions, _ChosenUpsampler):
    """An upsampler, and the options of all of them: those of the others keep their defaults."""

    def __post_init__(self) -> None:
        """Check the options of every upsampler; refuse those of another than the chosen one."""
        check_method_options(self, self.upsampler, UPSAMPLER_OPTIONS)

    @property
    def upsampler_options(self) -> object:
        """The options of the chosen upsampler alone, as its class in `UPSAMPLER_OPTIONS`."""
        return own_options(self, UPSAMPLER_OPTIONS.get(self.upsampler, NoOptions))
