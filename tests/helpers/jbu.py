"""Inputs and parameters of joint bilateral upsampling for tests, and which implementations there are."""

import pytest
import torch

from kernels.jbu import JBUStage

CUDA = torch.cuda.is_available()
# Without a GPU, Triton's kernels run in its interpreter (tests/conftest.py).
TRITON = pytest.param("triton", marks=pytest.mark.gpu if CUDA else ())
COMPILED = ["cpu", TRITON]
ALL = [*COMPILED, "reference"]


def device_of(implementation):
    return "cuda" if implementation == "triton" and CUDA else "cpu"


def random_kernel(B, h, w, radius, dtype=torch.float32):
    """Signed, and not summing to 1, as learned kernels are."""
    return torch.randn(B, (2 * radius + 1) ** 2, 2 * h, 2 * w, dtype=dtype)


def random_stage(key_dim=32, radius=3):
    """Parameters as large as trained ones: every part has a say in the kernel."""
    stage = JBUStage(key_dim=key_dim, radius=radius)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.1)
    return stage


def random_copy(stage):
    """Of a stage with any number of keys."""
    copy = JBUStage(key_dim=len(stage.range_proj[3].bias), radius=stage.radius).to(stage.range_temp.device)
    copy.load_state_dict(stage.state_dict())
    return copy
