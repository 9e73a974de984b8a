"""Implementations of joint bilateral upsampling as operators of torch: their gradients, and what torch asks of them."""

import pytest
import torch

from kernels.jbu import adaptive_conv_upsample2x, bilateral_stage, learned_stage
from kernels.jbu import operators as jbu_operators
from kernels.jbu import reference as jbu_reference
from kernels.jbu.parameters import StageParameters
from tests.helpers.jbu import ALL, COMPILED, device_of, random_copy, random_kernel, random_stage
from tests.helpers.rounding import assert_close, term_sizes


@pytest.mark.parametrize(("C", "h", "w", "radius"), [(2, 3, 4, 1), (21, 6, 5, 3)])
@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients_of_adaptive_conv(implementation, C, h, w, radius):
    device = device_of(implementation)
    source = torch.randn(2, C, h, w, device=device, requires_grad=True)
    kernel = random_kernel(2, h, w, radius).to(device).requires_grad_()
    weight = torch.randn(2, C, 2 * h, 2 * w, device=device)
    gradients = torch.autograd.grad(
        (weight * adaptive_conv_upsample2x(source, kernel, implementation=implementation)).sum(), (source, kernel)
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (source, kernel)]
    expected = torch.autograd.grad((weight * jbu_reference.adaptive_conv_upsample2x(*wide)).sum(), wide)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("needed", ["source", "kernel"])
@pytest.mark.parametrize("implementation", COMPILED)
def test_only_the_gradient_that_is_needed(implementation, needed):
    device = device_of(implementation)
    tensors = {"source": torch.randn(1, 2, 4, 5), "kernel": random_kernel(1, 4, 5, 2)}
    tensors = {name: tensor.to(device).requires_grad_(name == needed) for name, tensor in tensors.items()}
    output = adaptive_conv_upsample2x(**tensors, implementation=implementation)
    output.sum().backward()
    expected = torch.autograd.grad(jbu_reference.adaptive_conv_upsample2x(**tensors).sum(), tensors[needed])[0]
    assert_close(tensors.pop(needed).grad, expected, 1e-5)
    assert next(iter(tensors.values())).grad is None


@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients_of_a_learned_stage(implementation):
    device = device_of(implementation)
    stage, source = random_stage().to(device), torch.randn(2, 5, 6, 4, device=device)
    guidance = torch.randn(2, 3, 12, 8, device=device, requires_grad=True)
    weight = torch.randn(2, 5, 12, 8, device=device)
    output = learned_stage(source, guidance, stage, implementation=implementation)
    gradients = torch.autograd.grad((weight * output).sum(), (guidance, *stage.parameters()))

    def reference(weight, source, *wanted):
        guidance, wide = wanted[0].detach().requires_grad_(), random_copy(stage).double()
        for parameter, value in zip(wide.parameters(), wanted[1:], strict=True):
            parameter.data = value.data
        output = jbu_reference.learned_stage(source, guidance, StageParameters.of(wide))
        return torch.autograd.grad((weight * output).sum(), (guidance, *wide.parameters()))

    inputs = [tensor.double() for tensor in (weight, source, guidance, *stage.parameters())]
    for actual, wanted, size in zip(gradients, reference(*inputs), term_sizes(reference, *inputs), strict=True):
        assert_close(actual, wanted, 1e-5, size)


# --- As operators of torch ---

torch_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck reads it itself


@torch_warns
@pytest.mark.parametrize("implementation", COMPILED)
def test_operators_are_what_torch_expects(implementation):
    device = device_of(implementation)
    source, guidance = torch.randn(1, 3, 4, 5, device=device), torch.rand(1, 3, 8, 10, device=device)
    kernel, keys = random_kernel(1, 4, 5, 1).to(device), torch.randn(1, 4, 8, 10, device=device)
    stage = [tensor.detach() for tensor in StageParameters.of(random_stage(4, 1).to(device))]
    gradient, scale = torch.randn(1, 3, 8, 10, device=device), [torch.ones(3, device=device)] * 2
    for operator, arguments in {
        "adaptive_conv_upsample2x": (source.requires_grad_(), kernel.requires_grad_()),
        "adaptive_conv_upsample2x_backward": (gradient, source.detach(), kernel.detach(), True, False),
        "range_products": (keys.requires_grad_(), 1),
        "range_products_backward": (torch.randn(1, 9, 8, 10, device=device), keys.detach(), 1),
        "bilateral_kernel": (guidance, 1.5, 0.1, 1),
        "learned_kernel": (guidance, stage),
        "bilateral_stage": (source.detach(), guidance, 1.5, 0.1, 1),
        "learned_stage": (source.detach(), guidance, stage),
        "bilateral_codes": (source.detach(), guidance, 1.5, 0.1, 1, *scale),
        "learned_codes": (source.detach(), guidance, stage, *scale),
    }.items():
        torch.library.opcheck(getattr(jbu_operators, operator), (*arguments, implementation))


@pytest.mark.parametrize("implementation", ALL)
def test_compiles_without_a_break(implementation):
    device = device_of(implementation)
    source = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    guidance, stage = torch.randn(2, 3, 8, 10, device=device), random_stage(4, 1).to(device)

    def run(source, guidance):
        return 2 * learned_stage(source, guidance, stage, implementation=implementation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (compiled, run):  # fills .grad twice: the second time it must double
        function(source, guidance).sum().backward()
    torch.testing.assert_close(source.grad, 2 * torch.autograd.grad(run(source, guidance).sum(), source)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(source, guidance), run(source, guidance))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at its first use
def test_forward_mode_derivatives_are_the_references():
    """Operators have none, and torch would take them for 0."""
    source, kernel, guidance = torch.randn(1, 3, 5, 6), random_kernel(1, 5, 6, 2), torch.rand(1, 3, 10, 12)
    output, tangent = torch.func.jvp(lambda s: adaptive_conv_upsample2x(s, kernel), (source,), (source,))
    assert_close(tangent, output, 1e-6)
    output, tangent = torch.func.jvp(lambda s: bilateral_stage(s, guidance, 1.5, 0.1), (source,), (source,))
    assert_close(tangent, output, 1e-6)
    with pytest.raises(ValueError, match="'cpu' cannot take these inputs: it has no forward-mode derivatives"):
        torch.func.jvp(lambda s: adaptive_conv_upsample2x(s, kernel, implementation="cpu"), (source,), (source,))
