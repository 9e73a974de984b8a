"""Private parts of torch that kernels use, one function each."""

from collections.abc import Callable
from typing import TypeVar

from torch.autograd import forward_ad

__all__ = ["constant_for_compiler", "in_forward_mode"]

Function = TypeVar("Function", bound=Callable[..., object])


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is active (`torch.func.jvp` and the like).

    Torch has no public function for this: `torch.autograd.forward_ad` enters levels, but does not expose their number.
    """
    return forward_ad._current_level >= 0


def constant_for_compiler(function: Function) -> Function:
    """Mark a function whose result `torch.compile` treats as a constant, so that it does not trace the function.

    Replaces `torch.compiler.assume_constant_result`, which does the same but imports the compiler, which adds five
    seconds to each start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
