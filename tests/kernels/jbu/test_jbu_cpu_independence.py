"""What results of the CPU implementation must not depend on: threads, the batch, a fork; and that it may be missing."""

import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import jbu
from kernels.jbu import cpu as jbu_cpu
from kernels.quantization import Quantization
from tests.helpers.jbu import random_stage

ROOT = Path(__file__).parents[3]
CPU = {"implementation": "cpu"}


@torch.no_grad()
def everything(source, guidance, stage, gradient):
    """Results of all that is compiled."""
    quantization = Quantization(torch.full((source.shape[1],), 0.01), torch.zeros(source.shape[1]))
    kernel = jbu.learned_kernel(guidance, stage, **CPU)
    return [
        kernel,
        jbu.adaptive_conv_upsample2x(source, kernel, **CPU),
        *jbu_cpu.adaptive_conv_upsample2x_backward(gradient, source, kernel, True, True),
        jbu_cpu.range_products(source, 3),
        jbu_cpu.range_products_backward(kernel[:, :, ::2, ::2], source, 3),
        jbu.bilateral_stage(source, guidance, 1.5, 0.1, **CPU),
        *jbu.bilateral_codes(source, guidance, 1.5, 0.1, 3, quantization, **CPU),
        *jbu.learned_codes(source, guidance, stage, quantization, **CPU),
    ]


def random_case(B=2, C=17, h=21, w=35):  # enough for several threads
    return torch.randn(B, C, h, w), torch.rand(B, 3, 2 * h, 2 * w), random_stage(), torch.randn(B, C, 2 * h, 2 * w)


def test_results_do_not_depend_on_threads(threads):
    case, results = random_case(), []
    for count in (1, 2, 5):
        threads(count)
        results.append(everything(*case))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_images_of_a_batch_do_not_depend_on_each_other():
    source, guidance, stage, gradient = random_case(3)
    source[1, 4, 5, 6] = math.inf
    whole = [result.nan_to_num() for result in everything(source, guidance, stage, gradient)]
    for image in range(3):
        only = slice(image, image + 1)
        alone = everything(source[only], guidance[only], stage, gradient[only])
        assert all(torch.equal(one.nan_to_num(), every[only]) for one, every in zip(alone, whole, strict=True))


def test_two_threads_at_once(threads):
    threads(2)
    cases = [random_case() for _ in range(6)]
    alone = [everything(*case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for together, expected in zip(pool.map(lambda case: everything(*case), cases), alone, strict=True):
            assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_works_after_a_fork(threads):
    threads(2)
    source, guidance = random_case()[:2]
    expected = jbu_cpu.bilateral_stage(source, guidance, 1.5, 0.1, 3).numpy()
    process = os.fork()
    if process == 0:  # has no thread but this one: its parent's pool is of no use to it, nor are torch's threads
        signal.alarm(60)
        output = jbu_cpu.bilateral_stage(source, guidance, 1.5, 0.1, 3).numpy()
        os._exit(0 if np.array_equal(output, expected) else 1)
    assert os.waitpid(process, 0)[1] == 0


BROKEN = """
import torch
from kernels.jbu import bilateral_stage, explain
from kernels.dispatch import kind
source, guidance = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)
bilateral_stage(source, guidance, 1.0, 0.1)
print(explain(kind(source)))
"""


def in_another_python(root, **environment):
    command = [sys.executable, "-c", BROKEN]
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_without_compilation_the_reference_runs():
    done = in_another_python(ROOT, NUMBA_DISABLE_JIT="1")
    assert "reference (not cpu: it cannot be imported: ImportError: NUMBA_DISABLE_JIT is set" in done.stdout
