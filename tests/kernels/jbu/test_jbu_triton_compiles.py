"""Every Triton kernel of joint bilateral upsampling compiles for the GPUs it is for. No GPU is needed.

This file is also the program that compiles (``python test_jbu_triton_compiles.py arch dtype radius operations``): in a
process of its own, as Triton either interprets its kernels or compiles them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.triton_compiles import ROOT, SHARED_MEMORY, compiled, reports_of

OPERATIONS = (
    "learned_stage learned_codes bilateral_stage bilateral_codes adaptive_conv learned_kernel bilateral_kernel "
    "range_products adaptive_conv_backward range_products_backward"
)
EVERY_KERNEL = (
    "learned_codes bilateral_stage adaptive_conv range_products adaptive_conv_backward range_products_backward"
)
LARGEST = "learned_codes"
# Half features with float32 guidance are "float16/float32".
SOME = [
    pytest.param((80, "float16", 3, EVERY_KERNEL), marks=pytest.mark.slow),
    (90, "float16", 3, EVERY_KERNEL),
]
ALL = [(80, "float32", 3), (100, "bfloat16", 3)]
ALL += [(arch, dtype, radius) for arch in SHARED_MEMORY for dtype in ("float16", "float32") for radius in (1, 3, 7)]
ALL += [(90, "float16/float32", 3), (90, "bfloat16", 5)]


def compile_operations(arch, dtypes, radius, operations):
    """Call operations with tensors that have no memory, and compile where they launch. Print what was compiled."""
    from kernels.jbu import triton as jbu_triton
    from kernels.jbu.parameters import JBUStage, StageParameters
    from kernels.jbu.triton import backward, launching, learned
    from kernels.quantization import Quantization

    reports = []

    def compile_instead(kernel, grid, geometry, dtype, /, **arguments):
        options = launching.options(geometry, dtype, arguments)
        report = compiled(kernel, arch, arguments | geometry.constants(), options)
        reports.append({"operation": operation} | report)

    for module in (jbu_triton, backward, learned):
        module.launch = compile_instead
    dtype, guidance_dtype = (getattr(torch, name) for name in (dtypes.split("/") * 2)[:2])
    B, C, h, w, taps = 2, 128, 112, 112, (2 * radius + 1) ** 2
    torch.set_default_device("meta")
    source = torch.empty(B, C, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    guidance = torch.empty(B, 3, 2 * h, 2 * w, dtype=guidance_dtype)
    kernel, high, keys = (torch.empty(B, channels, 2 * h, 2 * w, dtype=dtype) for channels in (taps, C, 32))
    stage = StageParameters.of(JBUStage(radius=radius).to(guidance_dtype))
    scale = Quantization(torch.empty(C), torch.empty(C))
    calls = {
        "learned_stage": lambda: jbu_triton.learned_stage(source, guidance, stage),
        "learned_codes": lambda: jbu_triton.learned_stage(source, guidance, stage, scale),
        "bilateral_stage": lambda: jbu_triton.bilateral_stage(source, guidance, 1.5, 0.1, radius),
        "bilateral_codes": lambda: jbu_triton.bilateral_stage(source, guidance, 1.5, 0.1, radius, scale),
        "adaptive_conv": lambda: jbu_triton.adaptive_conv_upsample2x(source, kernel),
        "learned_kernel": lambda: jbu_triton.learned_kernel(guidance, stage),
        "bilateral_kernel": lambda: jbu_triton.bilateral_kernel(guidance, 1.5, 0.1, radius),
        "range_products": lambda: jbu_triton.range_products(keys, radius),
        "adaptive_conv_backward": lambda: jbu_triton.adaptive_conv_upsample2x_backward(
            high, source, kernel, True, True
        ),
        "range_products_backward": lambda: jbu_triton.range_products_backward(kernel, keys, radius),
    }
    for operation in operations.split():
        calls[operation]()
    json.dump(reports, sys.stdout)


def check(cache, arch, dtypes, radius, operations):
    reports = reports_of(__file__, cache, arch, dtypes, radius, operations)
    assert {report["operation"] for report in reports} == set(operations.split())
    # Spilling is what large kernels of float32 cost. Where it is fast, next to nothing may be.
    spilled = 512 if "float32" not in dtypes and radius <= 3 else 2560
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY[arch], report
        assert report["stack"] <= spilled, report
        assert report["matrix_units"], report


@pytest.mark.parametrize("case", SOME, ids=lambda case: f"sm_{case[0]}-{case[1]}")
def test_compiles(case, tmp_path):
    check(tmp_path, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: f"sm_{case[0]}-{case[1]}-radius {case[2]}")
def test_everything_compiles(case, tmp_path):
    check(tmp_path, *case, OPERATIONS)


WHERE_NOTHING_CAN_BE_KEPT = """
import os
import doubling
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu.cache import ensure_cache
ensure_cache()
ensure_cache()
triton.compile(ASTSource(doubling.double, {"x": "*fp32"}, {}, {}), target=GPUTarget("cuda", 80, 32))
print(triton.knobs.cache.dir)
assert os.listdir(triton.knobs.cache.dir)
"""


@pytest.mark.parametrize("unwritable", ["TRITON_CACHE_DIR", "TRITON_HOME", "HOME"])
def test_where_its_cache_cannot_be_written(tmp_path, unwritable):
    pytest.importorskip("triton")
    double = "import triton\nimport triton.language as tl\n@triton.jit\ndef double(x): tl.store(x, tl.load(x) * 2)\n"
    (tmp_path / "doubling.py").write_text(double)
    unset = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {unwritable: "/proc/none", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", WHERE_NOTHING_CAN_BE_KEPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is not writable: each process compiles again. Set TRITON_CACHE_DIR") == 1
    assert not Path(done.stdout.strip()).exists()  # any more


if __name__ == "__main__":
    compile_operations(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
