"""Joint bilateral upsampling: the public operations, which check arguments and run an implementation.

A stage doubles the resolution of its source. `bilateral_stage` and `learned_stage` are whole stages;
`bilateral_kernel`, `learned_kernel` and `adaptive_conv_upsample2x` are their parts. ``…_codes`` return int8 codes
instead of features. All others are differentiable once in reverse mode. In forward mode, their definition
`kernels.jbu.reference` runs.
"""

import math

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import Choice, Kind
from kernels.jbu import operators, reference
from kernels.jbu.checks import (
    check_adaptive_conv,
    check_bilateral,
    check_quantization,
    check_stage,
    checked_parameters,
)
from kernels.jbu.parameters import JBUStage
from kernels.quantization import Codes, Quantization, quantized

__all__ = [
    "adaptive_conv_upsample2x",
    "bilateral_codes",
    "bilateral_kernel",
    "bilateral_stage",
    "explain",
    "learned_codes",
    "learned_kernel",
    "learned_stage",
]


def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor, *, implementation: str | None = None) -> Tensor:
    """Upsample ×2 bicubically, then weight each output pixel's n × n neighbourhood with its own kernel.

    FeatUp (arXiv 2403.10516, equation 4); differentiable in both arguments.

    Args:
        source: [B, C, h, w], floating, not empty.
        kernel: [B, n*n, 2h, 2w], n = 2*radius + 1, taps row-major; dtype and device of source; 2h and 2w > radius.
        implementation: "cpu", "triton" or "reference"; None picks the first that can (`kernels.dispatch`).

    Returns:
        [B, C, 2h, 2w], dtype of source, in channels_last memory format.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    check_adaptive_conv(source, kernel)
    chosen = _chosen(implementation, math.isqrt(kernel.shape[1]) // 2, source, kernel)
    if chosen == "reference":
        return reference.adaptive_conv_upsample2x(source, kernel)
    output: Tensor = operators.adaptive_conv_upsample2x(source, kernel, chosen)
    return output


def bilateral_kernel(
    guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int = 3, *, implementation: str | None = None
) -> Tensor:
    """Compute the training-free kernel: spatial Gaussian × colour Gaussian, normalised over the taps.

    Kopf et al. (SIGGRAPH 2007, equation 3). If the guidance needs a gradient, the reference runs.

    Args:
        guidance: [B, G, H, W], floating, finite, H and W > radius.
        sigma_spatial: spatial standard deviation, in pixels of the guidance; 1e-30 … 1e30.
        sigma_range: standard deviation of the range kernel, in units of the guidance (Euclidean distance over its
            channels); 1e-30 … 1e30.
        radius: radius of the kernel, in pixels of the guidance; at least 1.
        implementation: "cpu", "triton" or "reference"; None picks the first that can (`kernels.dispatch`).

    Returns:
        [B, n*n, H, W], n = 2*radius + 1, dtype of guidance; non-negative, sums to 1 over taps.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    check_bilateral(guidance, sigma_spatial, sigma_range, radius)
    chosen = _chosen(implementation, radius, guidance)
    if chosen == "reference" or _needs_gradient(guidance):
        return reference.bilateral_kernel(guidance, sigma_spatial, sigma_range, radius)
    kernel: Tensor = operators.bilateral_kernel(guidance, sigma_spatial, sigma_range, radius, chosen)
    return kernel


def learned_kernel(guidance: Tensor, stage: JBUStage, *, implementation: str | None = None) -> Tensor:
    """Compute FeatUp's learned kernel (arXiv 2403.10516, equations 5-7); differentiable in guidance and parameters.

    Args:
        guidance: [B, stage.guidance_dim, H, W], floating, ImageNet-normalised, H and W > stage.radius.
        stage: parameters, in the guidance's dtype and on its device.
        implementation: "cpu", "triton" or "reference"; None picks the first that can (`kernels.dispatch`).

    Returns:
        [B, n*n, H, W], n = 2*stage.radius + 1, dtype of guidance; may be negative, need not sum to 1.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    parameters = checked_parameters(guidance, stage)
    chosen = _chosen(implementation, parameters.radius, guidance)
    if chosen == "reference":
        return reference.learned_kernel(guidance, parameters)
    if _needs_gradient(guidance, *parameters):
        # Everything except the products consists of 1×1 convolutions and pointwise operations: torch has gradients.
        products = operators.range_products(parameters.keys(guidance), parameters.radius, chosen)
        return reference.kernel_from_range_products(products, guidance, parameters)
    kernel: Tensor = operators.learned_kernel(guidance, list(parameters), chosen)
    return kernel


def bilateral_stage(
    source: Tensor,
    guidance: Tensor,
    sigma_spatial: float,
    sigma_range: float,
    radius: int = 3,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Upsample ×2 with a training-free kernel: `adaptive_conv_upsample2x` with the guidance's `bilateral_kernel`.

    Args:
        source: [B, C, h, w], floating, not empty.
        guidance: [B, G, 2h, 2w], floating, finite; on the source's device, in its dtype or float32.
        sigma_spatial: as in `bilateral_kernel`.
        sigma_range: as in `bilateral_kernel`.
        radius: as in `bilateral_kernel`.
        implementation: "cpu", "triton" or "reference"; None picks the first that can (`kernels.dispatch`).

    Returns:
        [B, C, 2h, 2w], dtype of source, in channels_last memory format.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    check_bilateral(guidance, sigma_spatial, sigma_range, radius)
    check_stage(source, guidance)
    chosen = _chosen(implementation, radius, source, guidance)
    if chosen == "reference" or _needs_gradient(source, guidance):
        kernel = bilateral_kernel(guidance, sigma_spatial, sigma_range, radius, implementation=implementation)
        return adaptive_conv_upsample2x(source, kernel.to(source.dtype), implementation=implementation)
    output: Tensor = operators.bilateral_stage(source, guidance, sigma_spatial, sigma_range, radius, chosen)
    return output


def learned_stage(source: Tensor, guidance: Tensor, stage: JBUStage, *, implementation: str | None = None) -> Tensor:
    """Upsample ×2 with FeatUp's learned kernel: `adaptive_conv_upsample2x` with the guidance's `learned_kernel`.

    Args:
        source: [B, C, h, w], floating, not empty.
        guidance: [B, stage.guidance_dim, 2h, 2w], ImageNet-normalised; on the source's device, in its dtype or float32.
        stage: parameters, in the guidance's dtype and on its device.
        implementation: "cpu", "triton" or "reference"; None picks the first that can (`kernels.dispatch`).

    Returns:
        [B, C, 2h, 2w], dtype of source, in channels_last memory format.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    parameters = checked_parameters(guidance, stage)
    check_stage(source, guidance)
    chosen = _chosen(implementation, parameters.radius, source, guidance)
    if chosen == "reference" or _needs_gradient(source, guidance, *parameters):
        kernel = learned_kernel(guidance, stage, implementation=implementation)
        return adaptive_conv_upsample2x(source, kernel.to(source.dtype), implementation=implementation)
    output: Tensor = operators.learned_stage(source, guidance, list(parameters), chosen)
    return output


def bilateral_codes(
    source: Tensor,
    guidance: Tensor,
    sigma_spatial: float,
    sigma_range: float,
    radius: int,
    quantization: Quantization,
    *,
    implementation: str | None = None,
) -> Codes:
    """`bilateral_stage` with quantized output, which avoids writing float features to memory. Not differentiable.

    Args:
        source: as in `bilateral_stage`.
        guidance: as in `bilateral_stage`.
        sigma_spatial: as in `bilateral_stage`.
        sigma_range: as in `bilateral_stage`.
        radius: as in `bilateral_stage`.
        quantization: steps and offsets [C] float32, on the source's device; steps > 0 (not checked).
        implementation: as in `bilateral_stage`.

    Returns:
        Codes of the features [B, C, 2h, 2w]. Half-precision features are rounded before they are quantized, except by
        "triton", which quantizes the float32 sums: its codes may differ by one.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    check_bilateral(guidance, sigma_spatial, sigma_range, radius)
    check_stage(source, guidance)
    check_quantization(quantization, source)
    chosen = _chosen(implementation, radius, source, guidance)
    with torch.no_grad():
        if chosen == "reference":
            output = reference.bilateral_stage(source, guidance, sigma_spatial, sigma_range, radius)
            return quantized(output, quantization)
        scale = quantization.step, quantization.offset
        return Codes(*operators.bilateral_codes(source, guidance, sigma_spatial, sigma_range, radius, *scale, chosen))


def learned_codes(
    source: Tensor, guidance: Tensor, stage: JBUStage, quantization: Quantization, *, implementation: str | None = None
) -> Codes:
    """`learned_stage` with quantized output, which avoids writing float features to memory. Not differentiable.

    Args:
        source: as in `learned_stage`.
        guidance: as in `learned_stage`.
        stage: as in `learned_stage`.
        quantization: steps and offsets [C] float32, on the source's device; steps > 0 (not checked).
        implementation: as in `learned_stage`.

    Returns:
        As for `bilateral_codes`.

    Raises:
        ValueError: an argument is not as above, or the selected implementation cannot take these inputs.
    """
    parameters = checked_parameters(guidance, stage)
    check_stage(source, guidance)
    check_quantization(quantization, source)
    chosen = _chosen(implementation, parameters.radius, source, guidance)
    with torch.no_grad():
        if chosen == "reference":
            output = reference.learned_stage(source, guidance, parameters)
            return quantized(output, quantization)
        scale = quantization.step, quantization.offset
        return Codes(*operators.learned_codes(source, guidance, list(parameters), *scale, chosen))


def explain(*kinds: Kind, radius: int = 3) -> Choice:
    """Tell which implementation runs on inputs of these kinds, and why the others don't.

    Args:
        kinds: kinds of an operation's tensors (`kernels.dispatch.kind`): source and kernel; source and guidance; …
        radius: radius of the kernel.

    Raises:
        ValueError: ``DENSEFEAT_KERNELS`` selects an implementation that does not exist, or that cannot take such
            inputs.
    """
    return dispatch.explain("jbu", *kinds, radius=radius)


def _chosen(implementation: str | None, radius: int, *tensors: Tensor) -> str:
    return dispatch.choose("jbu", implementation, *tensors, radius=radius)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
