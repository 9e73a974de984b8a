"""Register the compiled implementations as torch operators: schemas, output shapes, gradients.

The last argument of each is the name of the implementation. For `torch.compile`, autograd and export, an operator is
opaque with a known output shape. The plain-torch reference needs no operators and is called directly (`kernels.jbu`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.jbu.parameters import StageParameters
from kernels.quantization import Codes, Quantization

__all__ = [
    "adaptive_conv_upsample2x",
    "bilateral_codes",
    "bilateral_kernel",
    "bilateral_stage",
    "learned_codes",
    "learned_kernel",
    "learned_stage",
    "range_products",
]


def module(name: str) -> Any:
    """Module of an implementation."""
    return dispatch.implementation("jbu", name)


def _operator(function: Callable[..., Any]) -> Any:
    return torch.library.custom_op(f"densefeat::{function.__name__}", function, mutates_args=())


# --- Adaptive convolution ---


@_operator
def adaptive_conv_upsample2x(source: Tensor, kernel: Tensor, implementation: str) -> Tensor:
    """source [B, C, h, w], kernel [B, n*n, 2h, 2w] -> [B, C, 2h, 2w], channels_last."""
    output: Tensor = module(implementation).adaptive_conv_upsample2x(source, kernel)
    return output


@_operator
def adaptive_conv_upsample2x_backward(
    gradient: Tensor, source: Tensor, kernel: Tensor, for_source: bool, for_kernel: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of source and kernel, contiguous; of shape [0] if not requested."""
    backward = module(implementation).adaptive_conv_upsample2x_backward
    for_source_, for_kernel_ = backward(gradient, source, kernel, for_source, for_kernel)
    return for_source_ if for_source else source.new_empty(0), for_kernel_ if for_kernel else kernel.new_empty(0)


@adaptive_conv_upsample2x.register_fake
def _(source: Tensor, kernel: Tensor, implementation: str) -> Tensor:
    return _twice_the_size(source)


@adaptive_conv_upsample2x_backward.register_fake
def _(
    gradient: Tensor, source: Tensor, kernel: Tensor, for_source: bool, for_kernel: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    return (
        source.new_empty(source.shape if for_source else [0]),
        kernel.new_empty(kernel.shape if for_kernel else [0]),
    )


def _save_source_and_kernel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, kernel, ctx.implementation = inputs
    ctx.save_for_backward(source, kernel)


def _adaptive_conv_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    for_source, for_kernel = ctx.needs_input_grad[:2]
    of_source, of_kernel = adaptive_conv_upsample2x_backward(
        gradient, *ctx.saved_tensors, for_source, for_kernel, ctx.implementation
    )
    return of_source if for_source else None, of_kernel if for_kernel else None, None


adaptive_conv_upsample2x.register_autograd(_adaptive_conv_gradients, setup_context=_save_source_and_kernel)


# --- Range products ---


@_operator
def range_products(keys: Tensor, radius: int, implementation: str) -> Tensor:
    """keys [B, D, H, W] -> [B, n*n, H, W]."""
    products: Tensor = module(implementation).range_products(keys, radius)
    return products


@_operator
def range_products_backward(gradient: Tensor, keys: Tensor, radius: int, implementation: str) -> Tensor:
    """Gradient of keys."""
    of_keys: Tensor = module(implementation).range_products_backward(gradient, keys, radius)
    return of_keys


@range_products.register_fake
def _(keys: Tensor, radius: int, implementation: str) -> Tensor:
    return _kernel_like(keys, radius)


@range_products_backward.register_fake
def _(gradient: Tensor, keys: Tensor, radius: int, implementation: str) -> Tensor:
    return keys.new_empty(keys.shape)


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keys, ctx.radius, ctx.implementation = inputs
    ctx.save_for_backward(keys)


def _range_products_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return range_products_backward(gradient, *ctx.saved_tensors, ctx.radius, ctx.implementation), None, None


range_products.register_autograd(_range_products_gradients, setup_context=_save_keys)


# --- Kernels and whole stages, without gradients: if one is needed, `kernels.jbu` composes them from the above ---


@_operator
def bilateral_kernel(
    guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int, implementation: str
) -> Tensor:
    """guidance [B, G, H, W] -> [B, n*n, H, W]."""
    kernel: Tensor = module(implementation).bilateral_kernel(guidance, sigma_spatial, sigma_range, radius)
    return kernel


@_operator
def learned_kernel(guidance: Tensor, stage: list[Tensor], implementation: str) -> Tensor:
    """guidance [B, G, H, W] -> [B, n*n, H, W]."""
    kernel: Tensor = module(implementation).learned_kernel(guidance, StageParameters.from_list(stage))
    return kernel


@_operator
def bilateral_stage(
    source: Tensor, guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int, implementation: str
) -> Tensor:
    """source [B, C, h, w], guidance [B, G, 2h, 2w] -> [B, C, 2h, 2w], channels_last."""
    output: Tensor = module(implementation).bilateral_stage(source, guidance, sigma_spatial, sigma_range, radius)
    return output


@_operator
def learned_stage(source: Tensor, guidance: Tensor, stage: list[Tensor], implementation: str) -> Tensor:
    """source [B, C, h, w], guidance [B, G, 2h, 2w] -> [B, C, 2h, 2w], channels_last."""
    output: Tensor = module(implementation).learned_stage(source, guidance, StageParameters.from_list(stage))
    return output


@_operator
def bilateral_codes(
    source: Tensor,
    guidance: Tensor,
    sigma_spatial: float,
    sigma_range: float,
    radius: int,
    step: Tensor,
    offset: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `bilateral_stage`, quantized -> the tensors of `Codes`."""
    stage = module(implementation).bilateral_stage
    codes: Codes = stage(source, guidance, sigma_spatial, sigma_range, radius, Quantization(step, offset))
    return codes.codes, codes.not_finite, codes.clipped


@_operator
def learned_codes(
    source: Tensor, guidance: Tensor, stage: list[Tensor], step: Tensor, offset: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `learned_stage`, quantized -> the tensors of `Codes`."""
    run = module(implementation).learned_stage
    codes: Codes = run(source, guidance, StageParameters.from_list(stage), Quantization(step, offset))
    return codes.codes, codes.not_finite, codes.clipped


@bilateral_kernel.register_fake
def _(guidance: Tensor, sigma_spatial: float, sigma_range: float, radius: int, implementation: str) -> Tensor:
    return _kernel_like(guidance, radius)


@learned_kernel.register_fake
def _(guidance: Tensor, stage: list[Tensor], implementation: str) -> Tensor:
    return _kernel_like(guidance, StageParameters.from_list(stage).radius)


@bilateral_stage.register_fake
def _(source: Tensor, *_: Any) -> Tensor:
    return _twice_the_size(source)


@learned_stage.register_fake
def _(source: Tensor, *_: Any) -> Tensor:
    return _twice_the_size(source)


@bilateral_codes.register_fake
def _(source: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _codes_like(source)


@learned_codes.register_fake
def _(source: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _codes_like(source)


def _twice_the_size(source: Tensor) -> Tensor:
    B, C, h, w = source.shape
    return source.new_empty(B, 2 * h, 2 * w, C).permute(0, 3, 1, 2)


def _kernel_like(image: Tensor, radius: int) -> Tensor:
    B, _, H, W = image.shape
    return image.new_empty(B, (2 * radius + 1) ** 2, H, W)


def _codes_like(source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, C, h, w = source.shape
    counts = [source.new_empty(B, dtype=torch.int32) for _ in range(2)]
    return source.new_empty(B, C, 2 * h, 2 * w, dtype=torch.int8), counts[0], counts[1]
