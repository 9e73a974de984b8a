"""Compile Triton kernels for GPUs that are not here, in a process that does not interpret them."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a program can have, in bytes
_MATRIX_UNITS = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


def compiled(kernel, arch, arguments, options):
    """Compile a kernel for arguments whose tensors may have no memory, and report what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    types |= {torch.int8: "*i8", torch.int32: "*i32", int: "i32", float: "fp32"}
    signature, constants, attributes, arguments = {}, {}, {}, dict(arguments)
    for place, name in enumerate(kernel.arg_names):
        value = arguments.pop(name)
        if kernel.params[place].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = types[value.dtype if tensor else type(value)]
        if tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    assert not arguments, f"{kernel.__name__} has no {', '.join(arguments)}"
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    units = sorted(set(_MATRIX_UNITS.findall(made.asm["ptx"])))
    report = {"kernel": kernel.__name__, "shared": made.metadata.shared, "matrix_units": units}
    return report | _usage(made.asm["cubin"])


def reports_of(program, cache, *arguments):
    """Run a program that prints reports as JSON, with a cache folder of its own, and read them."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _usage(cubin):
    """Registers and bytes of stack, where registers are spilled, of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}
