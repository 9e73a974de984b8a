"""Claim: JBU runs close to memory bandwidth. Four learned stages, ×16, all implementations in one run.

    python -m benchmarks.kernels.jbu

On a GPU: every size, C, batch and dtype. On a CPU: one image in float32, two threads, and the parts of one stage.
Compared are densefeat, the plain-torch definition, FeatUp's way (`benchmarks.kernels.jbu_peers`), AnyUp's attention and
bilinear interpolation. The floor is the time to read source and image once and write the output once (backward: also to
read its gradient, read source and image again, and write the source's gradient), at the bandwidth of a copy in the same
run.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels.jbu_peers import featup_stage
from benchmarks.timing import Function, median_ms, peak_bytes
from kernels.jbu import (
    JBUStack,
    Quantization,
    adaptive_conv_upsample2x,
    bilateral_codes,
    bilateral_kernel,
    bilateral_stage,
    learned_kernel,
    learned_stage,
)
from pipeline.upsamplers.anyup.network import AnyUp

SIGMAS = 1.5, 0.1
AGREE = {torch.float32: 1e-3, torch.float16: 3e-2}  # maximum difference between implementations


@dataclass(frozen=True)
class Case:
    """One problem size."""

    low: int
    C: int
    B: int
    dtype: torch.dtype
    backward: bool

    @property
    def size(self) -> int:
        return 16 * self.low

    def floor_bytes(self) -> int:
        itemsize = self.dtype.itemsize
        source, image = self.B * self.C * self.low**2 * itemsize, self.B * 3 * self.size**2 * itemsize
        output = self.B * self.C * self.size**2 * itemsize
        forward = source + image + output
        return forward + (output + source + image + source if self.backward else 0)

    def describe(self) -> dict[str, Any]:
        return {
            "sizes": f"{self.low}→{self.size}",
            "C": self.C,
            "batch": self.B,
            "dtype": str(self.dtype).removeprefix("torch."),
            "passes": "forward + backward" if self.backward else "forward",
        }


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        sizes = list(itertools.product((14, 32), (384, 128, 64)))
        batches, dtypes = (1, 32), (torch.float32, torch.float16)
    else:  # plain torch takes minutes for more than 64 channels at 512 px
        sizes = [(14, 384), (14, 128), (14, 64), (32, 64)]
        batches, dtypes = (1,), (torch.float32,)
    for (low, C), B, dtype, backward in itertools.product(sizes, batches, dtypes, (False, True)):
        if device == "cuda" or not (backward and low == 32):  # takes plain torch and AnyUp a quarter of an hour
            yield Case(low, C, B, dtype, backward)


def stack(source: Tensor, image: Tensor, stage_of: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Four stages, each guided by the image at its output's size."""
    for number in range(4):
        guidance = F.adaptive_avg_pool2d(image, (2 * source.shape[2], 2 * source.shape[3]))
        source = stage_of(source, guidance, number)
    return source


def sides_of(case: Case, device: str) -> dict[str, Function]:
    generator = torch.Generator().manual_seed(0)
    weights = JBUStack(1).to(device).requires_grad_(case.backward)
    image = torch.rand(case.B, 3, case.size, case.size, generator=generator).to(device)
    source = torch.randn(case.B, case.C, case.low, case.low, generator=generator).to(device, case.dtype)
    source.requires_grad_(case.backward)
    gradient = torch.randn(case.B, case.C, case.size, case.size, device=device, dtype=case.dtype)
    stages = weights.stages
    anyup = AnyUp().to(device, case.dtype).eval().requires_grad_(case.backward)
    forward: dict[str, Callable[[], Tensor]] = {
        "densefeat": lambda: stack(source, image, lambda s, g, n: learned_stage(s, g, stages[n])),
        "plain torch": lambda: stack(
            source, image, lambda s, g, n: learned_stage(s, g, stages[n], implementation="reference")
        ),
        "FeatUp's way": lambda: stack(source, image, lambda s, g, n: featup_stage(s, g, stages[n])),
        "densefeat, training-free": lambda: stack(source, image, lambda s, g, n: bilateral_stage(s, g, *SIGMAS)),
        "AnyUp": lambda: anyup(source, source, image.to(case.dtype), (case.size, case.size)),
        "bilinear": lambda: F.interpolate(source, image.shape[2:], mode="bilinear", align_corners=False),
    }
    forward = {name: function for name, function in forward.items() if _fits(partial(_without_gradient, function))}
    _check_agreement(forward, case)
    if not case.backward:
        return {name: partial(_without_gradient, function) for name, function in forward.items()}
    parameters = [source, *weights.parameters(), *anyup.parameters()]
    return {name: partial(_with_gradient, function, parameters, gradient) for name, function in forward.items()}


def _without_gradient(function: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return function()


def _with_gradient(function: Callable[[], Tensor], parameters: list[Tensor], gradient: Tensor) -> Any:
    return torch.autograd.grad(function(), parameters, gradient, allow_unused=True)


def _check_agreement(forward: dict[str, Callable[[], Tensor]], case: Case) -> None:
    if "plain torch" not in forward:  # out of memory
        return
    with torch.inference_mode():
        expected = forward["plain torch"]().float()
        for name in {"densefeat", "FeatUp's way"} & forward.keys():
            error = ((forward[name]().float() - expected).abs().max() / expected.abs().max()).item()
            if not error < AGREE[case.dtype]:
                raise AssertionError(f"{name} differs from the definition by {error:.1e} of its largest value: {case}")


def measure(case: Case, device: str) -> dict[str, Any]:
    sides = {name: function for name, function in sides_of(case, device).items() if _fits(function)}
    output = torch.randn(case.B, case.C, case.size, case.size, device=device, dtype=case.dtype)
    copied = torch.empty_like(output)
    ms = median_ms({**sides, "copy": lambda: copied.copy_(output)}, device)
    bandwidth = 2 * output.nbytes / ms.pop("copy")  # bytes per millisecond
    floor_ms = case.floor_bytes() / bandwidth
    measured = {
        name: {
            "ms_per_image": round(ms[name] / case.B, 4),
            "peak_bytes": peak_bytes(function, device),
            "gb_per_s": round(case.floor_bytes() / ms[name] / 1e6, 2),
            "over_floor": round(ms[name] / floor_ms, 2),
        }
        for name, function in sides.items()
    }
    return {
        "floor_ms_per_image": floor_ms / case.B,
        "copy_gb_per_s": round(bandwidth / 1e6, 1),
        "sides": measured,
        "threads": torch.get_num_threads(),
    }


def _fits(function: Function) -> bool:
    try:
        function()
    except torch.OutOfMemoryError:
        return False
    return True


def parts_on_cpu() -> Iterator[dict[str, Any]]:
    """One 112→224 stage and its parts, and stacks 14→224: k = 64, one image, one and two threads."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 224, 224, generator=generator)
    half, low = (torch.randn(1, 64, n, n, generator=generator) for n in (112, 14))
    weights = JBUStack(1).requires_grad_(False)
    kernel = bilateral_kernel(image, *SIGMAS)
    codes = Quantization(torch.full((64,), 0.05), torch.zeros(64))
    parts: dict[str, Callable[[str | None], Any]] = {
        "adaptive convolution 112→224": lambda i: adaptive_conv_upsample2x(half, kernel, implementation=i),
        "bilateral kernel 224": lambda i: bilateral_kernel(image, *SIGMAS, implementation=i),
        "learned kernel 224": lambda i: learned_kernel(image, weights.up4, implementation=i),
        "training-free stage 112→224": lambda i: bilateral_stage(half, image, *SIGMAS, implementation=i),
        "the same, to int8": lambda i: bilateral_codes(half, image, *SIGMAS, 3, codes, implementation=i),
        "training-free stack 14→224": lambda i: stack(
            low, image, lambda s, g, n: bilateral_stage(s, g, *SIGMAS, implementation=i)
        ),
        "learned stack 14→224": lambda i: stack(
            low, image, lambda s, g, n: learned_stage(s, g, weights.stages[n], implementation=i)
        ),
    }
    for threads, (name, part) in itertools.product((1, 2), parts.items()):
        torch.set_num_threads(threads)
        ms = median_ms({"densefeat": partial(part, None), "plain torch": partial(part, "reference")}, "cpu")
        yield {"part": name, "k": 64, "threads": threads, "ms": {side: round(value, 2) for side, value in ms.items()}}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured_on = rows.measured_on()
    if device == "cpu":
        for part in parts_on_cpu():
            rows.append("jbu_parts", row := {**part, **measured_on})
            print(json.dumps(row))
    for case in cases(device):
        rows.append("jbu", row := {**case.describe(), **measure(case, device), **measured_on})
        print(json.dumps(row))


if __name__ == "__main__":
    main()
