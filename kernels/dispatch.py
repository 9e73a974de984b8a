"""Choose the implementation of an operation, and explain why the others were not chosen.

Operations are grouped into families, each with a table of implementations in `IMPLEMENTATIONS`. ``reference`` is the
definition. An implementation is a module with

* the operations of its family, and their ``…_backward`` where they have one;
* ``reasons_not(kinds)``: all reasons why it cannot take inputs of the given kinds;
* ``LIMITS``, optional: the largest sizes that it takes, by name, such as ``radius``;
* ``FORWARD_MODE = False``, if it has no forward-mode derivatives. Otherwise, torch would treat them as zero.

The first implementation in the table that can take the inputs runs. A caller can select another one with
``implementation=…``, and the user can with the environment variable ``DENSEFEAT_KERNELS``. Its value is the name of an
implementation that all families have, or ``family=name``, or several of these, separated by commas; later ones override
earlier ones::

    DENSEFEAT_KERNELS=reference
    DENSEFEAT_KERNELS=jbu=triton,window_sum=reference

The variable is read at each call, in the process that computes. The caller's choice takes precedence over it.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kernels.internals.torch import constant_for_compiler, in_forward_mode

__all__ = [
    "IMPLEMENTATIONS",
    "SWITCH",
    "Choice",
    "Kind",
    "choose",
    "explain",
    "implementation",
    "kind",
    "not_of_dtypes",
    "not_on_cpu",
]

# Family -> name -> module, in order of preference. Imported at first use: it may need packages that are not installed.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "jbu": {"cpu": "kernels.jbu.cpu", "triton": "kernels.jbu.triton", "reference": "kernels.jbu.reference"},
    "multiview": {
        "cpu": "kernels.multiview.cpu",
        "batched": "kernels.multiview.batched",
        "reference": "kernels.multiview.reference",
    },
    "neighborhood_attention": {
        "cpu": "kernels.window.neighborhood.cpu",
        "triton": "kernels.window.neighborhood.triton",
        "reference": "kernels.window.neighborhood.reference",
    },
    "window_attention": {
        "tiled": "kernels.window.attention.tiled",
        "reference": "kernels.window.attention.reference",
    },
    "window_sum": {"cpu": "kernels.window.sum.cpu", "reference": "kernels.window.sum.reference"},
}
SWITCH = "DENSEFEAT_KERNELS"

_Sizes = tuple[tuple[str, int], ...]  # (name, size); hashable, and simple enough for torch.compile


class Kind(NamedTuple):
    """The properties of a tensor that decide which implementations can take it."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Choice:
    """The implementation for given inputs, and why the others cannot take them.

    Attributes:
        chosen: a name in the family's table of `IMPLEMENTATIONS`.
        reasons_not: name -> every reason why it cannot take the inputs; empty if it can, whether chosen or not.
        asked_by: the environment variable that selects it, with its value; None if it is the first that can.
    """

    chosen: str
    reasons_not: dict[str, list[str]]
    asked_by: str | None = None

    def __str__(self) -> str:
        """``triton (not cpu: it runs on the CPU, inputs are on cuda:0)``."""
        notes = [] if self.asked_by is None else [f"selected by {self.asked_by}"]
        notes += [f"not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons_not.items() if reasons]
        return self.chosen + (f" ({'. '.join(notes)})" if notes else "")


def kind(tensor: Tensor) -> Kind:
    """The kind of a tensor."""
    return Kind(tensor.device, tensor.dtype)


def explain(family: str, *kinds: Kind, **sizes: int) -> Choice:
    """Tell which implementation runs on inputs of these kinds, outside of forward-mode differentiation.

    Args:
        family: a name in `IMPLEMENTATIONS`.
        kinds: kinds of an operation's tensors: source and kernel; source and guidance; …
        sizes: sizes that implementations may limit, by name; for JBU, the ``radius``.

    Raises:
        ValueError: `SWITCH` selects an implementation that does not exist, or that cannot take such inputs.
    """
    reasons_not = {name: _reasons_not(family, name, kinds, tuple(sizes.items())) for name in IMPLEMENTATIONS[family]}
    asked, by = _selected(family, None)
    if asked is None:
        return Choice(next(name for name, reasons in reasons_not.items() if not reasons), reasons_not)
    _check(family, asked, by, reasons_not.get(asked, []))
    return Choice(asked, reasons_not, by)


def choose(family: str, asked: str | None, *tensors: Tensor, **sizes: int) -> str:
    """Name of the implementation to run: the caller's choice, else that of `SWITCH`, else the first that can.

    Args:
        family: a name in `IMPLEMENTATIONS`.
        asked: the caller's choice; None leaves it to `SWITCH`, or to the order of the table.
        tensors: all tensors of the operation that affect the choice.
        sizes: as in `explain`.

    Raises:
        ValueError: the selected implementation does not exist, or cannot take such inputs.
    """
    kinds = tuple((tensor.device, tensor.dtype) for tensor in tensors)
    return _choose(family, asked, kinds, tuple(sizes.items()), in_forward_mode())


@constant_for_compiler
def _choose(
    family: str,
    asked: str | None,
    kinds: tuple[tuple[torch.device, torch.dtype], ...],  # torch.compile loses named tuples
    sizes: _Sizes,
    forward_mode: bool,
) -> str:
    named = tuple(Kind(*each) for each in kinds)
    asked, by = _selected(family, asked)
    if asked is not None:
        reasons = _reasons_not(family, asked, named, sizes, forward_mode) if asked in IMPLEMENTATIONS[family] else []
        _check(family, asked, by, reasons)
        return asked
    names = IMPLEMENTATIONS[family]
    return next(name for name in names if not _reasons_not(family, name, named, sizes, forward_mode))


def implementation(family: str, name: str) -> Any:
    """The module of an implementation that `choose` returned."""
    module = _load(IMPLEMENTATIONS[family][name])
    assert isinstance(module, ModuleType), module
    return module


# --- Reasons ---


def not_on_cpu(kinds: Sequence[Kind]) -> list[str]:
    """Reason why an implementation for CPUs cannot take inputs on these devices; empty if it can."""
    devices = sorted({str(kind.device) for kind in kinds if kind.device.type != "cpu"})
    return [f"it runs on the CPU, inputs are on {', '.join(devices)}"] if devices else []


def not_of_dtypes(kinds: Sequence[Kind], dtypes: Sequence[torch.dtype]) -> list[str]:
    """Reason why an implementation for ``dtypes`` cannot take inputs of these dtypes; empty if it can."""
    others = sorted({str(kind.dtype) for kind in kinds if kind.dtype not in dtypes})
    return [f"it takes {', '.join(map(str, dtypes))}, inputs are {', '.join(others)}"] if others else []


def _reasons_not(
    family: str, name: str, kinds: tuple[Kind, ...], sizes: _Sizes, forward_mode: bool = False
) -> list[str]:
    return _reasons_not_to_run(IMPLEMENTATIONS[family][name], kinds, sizes, forward_mode)


@functools.lru_cache(256)
def _reasons_not_to_run(path: str, kinds: tuple[Kind, ...], sizes: _Sizes, forward_mode: bool) -> list[str]:
    loaded = _load(path)
    if isinstance(loaded, Exception):
        return [f"it cannot be imported: {type(loaded).__name__}: {loaded}"]
    reasons = list(cast(list[str], loaded.reasons_not(kinds)))
    limits: dict[str, int] = getattr(loaded, "LIMITS", {})
    for size, value in sizes:
        if size in limits and value > limits[size]:
            reasons.append(f"it takes a {size} up to {limits[size]}, not {value}")
    if forward_mode and not getattr(loaded, "FORWARD_MODE", True):
        reasons.append("it has no forward-mode derivatives")
    return reasons


@functools.cache
def _load(path: str) -> ModuleType | Exception:
    try:
        return importlib.import_module(path)
    except Exception as error:  # compilers raise any exception: an old numba, a KeyError
        return error


# --- Selection by the caller or the user ---


def _selected(family: str, asked: str | None) -> tuple[str | None, str]:
    """The implementation that the caller or `SWITCH` selects, or None; and the argument or variable that does so."""
    if asked is not None:
        return asked, "implementation"
    value = os.environ.get(SWITCH, "")
    return _parse_switch(value).get(family), f"{SWITCH}={value}"


@functools.lru_cache(8)
def _parse_switch(value: str) -> MappingProxyType[str, str]:
    """Family -> implementation that a value of `SWITCH` selects."""
    selected: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        prefix, equals, name = (part.strip() for part in entry.rpartition("="))
        for family in [prefix] if equals else IMPLEMENTATIONS:
            if name not in IMPLEMENTATIONS.get(family, {}):
                tables = "; ".join(f"{other}: {', '.join(names)}" for other, names in IMPLEMENTATIONS.items())
                raise ValueError(
                    f"{SWITCH}: got {entry!r}, need an implementation that all families have, or family=name. {tables}"
                )
            selected[family] = name
    return MappingProxyType(selected)


def _check(family: str, asked: str, by: str, reasons: list[str]) -> None:
    names = IMPLEMENTATIONS[family]
    if asked not in names:
        raise ValueError(f"{by}: got {asked!r}, need one of {', '.join(names)}, or None to choose")
    if reasons:
        raise ValueError(f"{by}: {asked!r} cannot take these inputs: {'; '.join(reasons)}")
