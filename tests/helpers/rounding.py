"""How close two computations of one thing must come, on whatever processor they run.

A sum is as exact as its terms are large, not as it is: when terms of 1000 cancel to 1, the result keeps the error of
those of 1000. In what order terms are added, and whether a product is rounded before it is added, differ from processor
to processor. So errors are held against the size of the terms:

* of products and sums that can be written down, it is the same computation of absolute values;
* of anything else, `term_sizes` measures it;
* an array of many sums of the same kind tells it by its largest element. One number does not, nor do a few.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_TELL_THEIR_TERMS = 32  # so many results of one kind, at least
_DRAWS = 4


def assert_close(actual: Tensor, expected: Tensor, rtol: float, size: Tensor | float | None = None) -> None:
    """Assert that no element is off by more than ``rtol`` of the size of the terms that it is the sum of.

    Args:
        actual: any dtype.
        expected: same shape; not finite where ``actual`` must be so too.
        rtol: e.g. some units of rounding of the dtype that was computed in.
        size: of the terms, for each element or for all. Without it: the largest element of ``expected``, which must
            have many.
    """
    expected = expected.detach().to(actual.device, torch.float64)
    if size is None:
        assert expected.numel() >= _TELL_THEIR_TERMS, f"{expected.numel()} results do not tell the size of their terms"
        size = expected.abs().max()
    allowed = rtol * torch.as_tensor(size, dtype=torch.float64, device=actual.device).expand(expected.shape)
    error = (actual.detach().double() - expected).abs()
    wrong = torch.where(expected.isfinite(), ~(error <= allowed), actual.isnan() != expected.isnan())
    assert actual.shape == expected.shape
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are off, by up to {(error / allowed).nan_to_num().max():.3g} "
        f"times what rounding allows: error {error[wrong].max():.3g}, terms of {(allowed / rtol)[wrong].max():.3g}"
    )


def term_sizes(function: Callable[..., Sequence[Tensor]], *inputs: Tensor, step: float = 1e-4) -> list[Tensor]:
    """Size of the terms of each result: the root of the sum of their squares, the largest of a tensor's elements.

    Measured by changing each number that goes in by a share of itself, at random: a sum then changes by that share of
    its terms, as it does by rounding.

    Args:
        function: of tensors like the inputs; returns tensors. The more exact it computes, the better.
        inputs: floating.
        step: the share; well above the rounding of ``function``.
    """
    exact = [result.detach().double() for result in function(*inputs)]
    sizes = [result.abs().max() for result in exact]
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        changed = function(*(_changed(tensor, step, generator) for tensor in inputs))
        for number, (result, before) in enumerate(zip(changed, exact, strict=True)):
            sizes[number] = torch.maximum(sizes[number], (result.detach().double() - before).abs().max() / step)
    return sizes


def _changed(tensor: Tensor, step: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (tensor.detach().double() * (1 + step * noise.to(tensor.device))).to(tensor.dtype)
