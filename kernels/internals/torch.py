"""Torch's own parts that kernels use, one function each."""

from collections.abc import Callable
from typing import TypeVar

from torch.autograd import forward_ad

__all__ = ["constant_for_compiler", "in_forward_mode"]

Function = TypeVar("Function", bound=Callable[..., object])


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open: `torch.func.jvp` and the like.

    Stands in for a question that torch does not answer: `torch.autograd.forward_ad` opens levels, and keeps their
    number to itself.
    """
    return forward_ad._current_level >= 0


def constant_for_compiler(function: Function) -> Function:
    """A function whose result `torch.compile` takes for a constant, and so does not look into.

    Stands in for `torch.compiler.assume_constant_result`, which does the same and imports the compiler: five seconds of
    each start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
