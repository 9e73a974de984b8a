"""Which implementation of joint bilateral upsampling runs, and why the others don't.

`kernels.jbu.reference` is the definition. An implementation is a module with the same operations, their
``…_backward`` where they have one; ``reasons_not``, which lists everything that keeps it from taking inputs of given
kinds; and ``MAX_RADIUS``, the largest radius of a kernel that it takes, if there is one. The first in
`IMPLEMENTATIONS` with no reason not to runs.
"""

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["IMPLEMENTATIONS", "Choice", "Kind", "choose", "explain", "implementation", "kind"]

# Name -> module, in order of preference. Imported at first use: an implementation may need what is not installed.
IMPLEMENTATIONS: dict[str, str] = {
    "cpu": "kernels.jbu.cpu",
    "triton": "kernels.jbu.triton",
    "reference": "kernels.jbu.reference",
}


class Kind(NamedTuple):
    """What of a tensor decides who can take it."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Choice:
    """Which implementation takes given inputs, and why the others don't.

    Attributes:
        chosen: a name in `IMPLEMENTATIONS`.
        reasons_not: name -> every reason why it cannot take them; empty for those that could, chosen or not.
    """

    chosen: str
    reasons_not: dict[str, list[str]]

    def __str__(self) -> str:
        """``triton (not cpu: it runs on the CPU, inputs are on cuda:0)``."""
        not_chosen = [f"not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons_not.items() if reasons]
        return self.chosen + (f" ({'. '.join(not_chosen)})" if not_chosen else "")


def kind(tensor: Tensor) -> Kind:
    """The kind of a tensor."""
    return Kind(tensor.device, tensor.dtype)


def explain(*kinds: Kind, radius: int = 3) -> Choice:
    """Tell which implementation runs on inputs of these kinds.

    Args:
        kinds: of an operation's tensors: source and kernel; source and guidance; …
        radius: of the kernel.

    Returns:
        The choice. Never fails: the reference takes everything.
    """
    reasons_not = {name: _reasons_not(name, kinds, radius) for name in IMPLEMENTATIONS}
    return Choice(next(name for name, reasons in reasons_not.items() if not reasons), reasons_not)


def choose(asked: str | None, radius: int, *tensors: Tensor) -> str:
    """The name of the implementation to run: the one asked for, or the first that can.

    Operators have no forward-mode derivative, and torch would take it for zero: within `torch.func.jvp` and the like
    the reference runs.

    Raises:
        ValueError: there is none of that name, or it cannot take such inputs.
    """
    if forward_ad._current_level >= 0:
        if asked not in (None, "reference"):
            raise ValueError(f"implementation: {asked!r} has no forward-mode derivatives: take 'reference', or None")
        return "reference"
    return _choose(asked, radius, tuple((tensor.device, tensor.dtype) for tensor in tensors))


def _choose(asked: str | None, radius: int, kinds: tuple[tuple[torch.device, torch.dtype], ...]) -> str:
    """`choose`, as torch.compile may take it for a constant: of plain tuples, it loses named ones."""
    named = tuple(Kind(*each) for each in kinds)
    if asked is None:
        return explain(*named, radius=radius).chosen
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {asked!r}, need one of {', '.join(IMPLEMENTATIONS)}, or None to choose")
    reasons = _reasons_not(asked, named, radius)
    if reasons:
        raise ValueError(f"implementation: {asked!r} cannot take these inputs: {'; '.join(reasons)}")
    return asked


# What torch.compiler.assume_constant_result does, but for importing the compiler: five seconds of each start.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(name: str) -> Any:
    """The module of an implementation that `choose` returned."""
    module = _load(name)
    assert isinstance(module, ModuleType), module
    return module


@functools.cache
def _load(name: str) -> ModuleType | Exception:
    try:
        return importlib.import_module(IMPLEMENTATIONS[name])
    except Exception as error:  # compilers fail in ways of their own: an old numba with a KeyError
        return error


@functools.lru_cache(256)
def _reasons_not(name: str, kinds: tuple[Kind, ...], radius: int) -> list[str]:
    loaded = _load(name)
    if isinstance(loaded, Exception):
        return [f"it cannot be imported: {type(loaded).__name__}: {loaded}"]
    reasons = cast(list[str], loaded.reasons_not(kinds))
    most = getattr(loaded, "MAX_RADIUS", None)
    return reasons if most is None or radius <= most else [*reasons, f"it takes a radius up to {most}, not {radius}"]
