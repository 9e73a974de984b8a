"""Claim: JBU on a CPU takes tens of milliseconds, not seconds: ours against the plain-torch definition.

    python -m benchmarks.upsampling_cpu

One 112→224 stage and the whole stack 14→224, k = 64, one image, one and two threads; medians, both sides in turn.
The floor is what a copy of the output takes on this machine in the same run.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import rows
from kernels.jbu import adaptive_conv_upsample2x, bilateral_kernel

K, RADIUS, SIGMA_SPATIAL, SIGMA_RANGE = 64, 3, 1.5, 0.1


def median_ms(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median milliseconds of each, run in turn so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def stack(source: torch.Tensor, image: torch.Tensor, implementation: str) -> torch.Tensor:
    """Four training-free stages."""
    for _ in range(4):
        guidance = torch.nn.functional.adaptive_avg_pool2d(image, 2 * source.shape[-1])
        kernel = bilateral_kernel(guidance, SIGMA_SPATIAL, SIGMA_RANGE, RADIUS, implementation=implementation)
        source = adaptive_conv_upsample2x(source, kernel, implementation=implementation)
    return source


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 224, 224, generator=generator)
    half, low = (torch.randn(1, K, n, n, generator=generator) for n in (112, 14))
    kernel = bilateral_kernel(image, SIGMA_SPATIAL, SIGMA_RANGE, RADIUS)
    output = torch.empty(1, K, 224, 224)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            measured = {
                "adaptive convolution 112→224": {
                    name: lambda name=name: adaptive_conv_upsample2x(half, kernel, implementation=name)
                    for name in ("cpu", "reference")
                },
                "bilateral kernel 224": {
                    name: lambda name=name: bilateral_kernel(
                        image, SIGMA_SPATIAL, SIGMA_RANGE, RADIUS, implementation=name
                    )
                    for name in ("cpu", "reference")
                },
                "stack 14→224": {name: lambda name=name: stack(low, image, name) for name in ("cpu", "reference")},
            }
            for what, functions in measured.items():
                times = median_ms({**functions, "copy": lambda: output.clone()}, runs=11)
                row = {"what": what, "k": K, "threads": threads, "ms": times, **rows.measured_on()}
                row["reference_over_cpu"] = round(times["reference"] / times["cpu"], 1)
                rows.append("upsampling_cpu", row)
                print(json.dumps(row))


if __name__ == "__main__":
    main()
