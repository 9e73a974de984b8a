"""Joint bilateral upsampling: the public operations. They check arguments and pick an implementation.

`kernels.jbu_reference` is the definition. An implementation is a module with the same four functions: the three
operations and ``reasons_not``, which lists everything that keeps it from taking given inputs. The first in
`IMPLEMENTATIONS` with no reason not to runs; `explain` says which one that is and what kept the others.
"""

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from kernels.jbu_reference import JBUStack, JBUStage

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "JBUStack",
    "JBUStage",
    "adaptive_conv_upsample2x",
    "bilateral_kernel",
    "explain",
    "learned_kernel",
]

# Name -> module, in order of preference. Imported at first use: an implementation may need what is not installed.
IMPLEMENTATIONS: dict[str, str] = {"cpu": "kernels.jbu_cpu", "reference": "kernels.jbu_reference"}


class _Implementation(Protocol):
    def reasons_not(self, *tensors: Tensor) -> list[str]: ...
    def adaptive_conv_upsample2x(self, source: Tensor, kernel: Tensor) -> Tensor: ...
    def learned_kernel(self, guidance: Tensor, stage: JBUStage) -> Tensor: ...
    def bilateral_kernel(
        self, guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3
    ) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """Which implementation takes given inputs, and why the others don't.

    Attributes:
        chosen: a name in `IMPLEMENTATIONS`.
        reasons_not: name -> every reason why it cannot take them; empty for those that could, chosen or not.
    """

    chosen: str
    reasons_not: dict[str, list[str]]


def explain(*tensors: Tensor) -> Choice:
    """Tell which implementation runs on these inputs.

    Args:
        tensors: an operation's tensor inputs: source and kernel; or guidance, and the parameters of a learned stage.

    Returns:
        The choice. Never fails: the reference takes everything.
    """
    reasons_not = {name: _reasons_not(name, tensors) for name in IMPLEMENTATIONS}
    return Choice(next(name for name, reasons in reasons_not.items() if not reasons), reasons_not)


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor, *, implementation: str | None = None) -> Tensor:
    """Upsample ×2 bicubically, then weigh each output pixel's n × n neighbourhood by its own kernel.

    FeatUp (arXiv 2403.10516, equation 4); defined by `kernels.jbu_reference.adaptive_conv_upsample2x`.

    Args:
        source: [B, C, h, w], floating, not empty.
        kernel: [B, n*n, 2h, 2w], n = 2*radius + 1, taps row-major; dtype and device of source; 2h and 2w > radius.
        implementation: a name in `IMPLEMENTATIONS`; None picks the first that can.

    Returns:
        [B, C, 2h, 2w], dtype of source; its memory format is the implementation's choice (channels_last for "cpu").

    Raises:
        ValueError: an argument is not as above, or the implementation asked for cannot take these inputs.
    """
    _check_image("source", source)
    _check_image("kernel", kernel)
    _check_same("kernel", kernel, "source", source)
    B, _, h, w = source.shape
    taps = kernel.shape[1]
    n = math.isqrt(taps)
    if n * n != taps or n % 2 == 0:
        raise ValueError(f"kernel: got {taps} channels, need n*n taps with n odd: 9, 25, 49, …")
    if kernel.shape != (B, taps, 2 * h, 2 * w):
        raise ValueError(
            f"kernel: got shape {tuple(kernel.shape)}, need {(B, taps, 2 * h, 2 * w)}: the batch of source "
            f"{tuple(source.shape)} and twice its size"
        )
    _check_reflects("source", "twice its size", 2 * h, 2 * w, n // 2)
    return _choose(implementation, source, kernel).adaptive_conv_upsample2x(source, kernel)


def bilateral_kernel(
    guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3, *, implementation: str | None = None
) -> Tensor:
    """Make the training-free kernel: spatial Gaussian × colour Gaussian, normalised over the taps.

    Kopf et al. (SIGGRAPH 2007, equation 3); defined by `kernels.jbu_reference.bilateral_kernel`.

    Args:
        guidance: [B, G, H, W], floating, finite, H and W > radius.
        sigma_spatial: in pixels of the guidance; finite, > 0.
        sigma_range: in units of the guidance (Euclidean distance over its channels); finite, > 0.
        radius: of the kernel, in pixels of the guidance; at least 1.
        implementation: a name in `IMPLEMENTATIONS`; None picks the first that can.

    Returns:
        [B, n*n, H, W], n = 2*radius + 1, dtype of guidance; non-negative, sums to 1 over taps.

    Raises:
        ValueError: an argument is not as above, or the implementation asked for cannot take these inputs.
    """
    _check_image("guidance", guidance)
    for name, sigma in (("sigma_spatial", sigma_spatial), ("sigma_range", sigma_range)):
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"{name}: got {sigma}, need a finite number greater than 0")
    if radius < 1:
        raise ValueError(f"radius: got {radius}, need at least 1")
    _check_reflects("guidance", "its size", guidance.shape[2], guidance.shape[3], radius)
    chosen = _choose(implementation, guidance)
    return chosen.bilateral_kernel(guidance, sigma_spatial, sigma_range, radius)


def learned_kernel(guidance: Tensor, stage: JBUStage, *, implementation: str | None = None) -> Tensor:
    """Make FeatUp's learned kernel.

    FeatUp (arXiv 2403.10516, equations 5-7); defined by `kernels.jbu_reference.learned_kernel`.

    Args:
        guidance: [B, stage.guidance_dim, H, W], floating, ImageNet-normalised, H and W > stage.radius.
        stage: parameters, in the guidance's dtype and on its device.
        implementation: a name in `IMPLEMENTATIONS`; None picks the first that can.

    Returns:
        [B, n*n, H, W], n = 2*stage.radius + 1, dtype of guidance; may be negative, need not sum to 1.

    Raises:
        ValueError: an argument is not as above, or the implementation asked for cannot take these inputs.
    """
    _check_image("guidance", guidance)
    _check_same("stage", stage.range_temp, "guidance", guidance)
    if guidance.shape[1] != stage.guidance_dim:
        raise ValueError(f"guidance: got {guidance.shape[1]} channels, need the stage's {stage.guidance_dim}")
    _check_reflects("guidance", "its size", guidance.shape[2], guidance.shape[3], stage.radius)
    return _choose(implementation, guidance, *stage.parameters()).learned_kernel(guidance, stage)


@functools.cache
def _load(name: str) -> _Implementation | ImportError:
    try:
        return cast(_Implementation, importlib.import_module(IMPLEMENTATIONS[name]))
    except ImportError as error:
        return error


def _reasons_not(name: str, tensors: tuple[Tensor, ...]) -> list[str]:
    loaded = _load(name)
    return [f"it cannot be imported: {loaded}"] if isinstance(loaded, ImportError) else loaded.reasons_not(*tensors)


def _choose(asked: str | None, *tensors: Tensor) -> _Implementation:
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {asked!r}, need one of {', '.join(IMPLEMENTATIONS)}, or None to choose")
    name = explain(*tensors).chosen if asked is None else asked
    loaded, reasons = _load(name), _reasons_not(name, tensors)
    if isinstance(loaded, ImportError) or reasons:
        raise ValueError(f"implementation: {name!r} cannot take these inputs: {'; '.join(reasons)}")
    return loaded


def _check_image(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 4 or not tensor.is_floating_point() or tensor.numel() == 0:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)} and dtype {tensor.dtype}, need four dimensions "
            "[batch, channels, height, width], none of size 0, and a floating dtype"
        )


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name}: got {tensor.dtype} on {tensor.device}, need {other_name}'s {other.dtype} on {other.device}"
        )


def _check_reflects(name: str, what: str, height: int, width: int, radius: int) -> None:
    if min(height, width) <= radius:
        raise ValueError(
            f"{name}: got {what} = {height}×{width}, need more than the radius {radius} on both axes: "
            "the border is reflected"
        )
