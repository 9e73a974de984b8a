"""Claim: every upsampler takes tens of milliseconds to a second, and folding in PCA makes expensive ones cheaper.

    python -m benchmarks.upsamplers.compared

From the features of a ViT-S/14 (384 channels) to k = 64 components at 224, 448 and 896 pixels, one image, one thread on
a CPU. Up to 448 also with all 384 channels, and for LiFT and AnyUp the plain way: all channels (AnyUp: with the full
attention matrix, which takes 50 GB at 896 pixels), then projected. Weights are random, which affects neither time nor
memory. ``--names`` measures only some.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.timing import median_ms, peak_bytes
from kernels.jbu import JBUStack
from kernels.window.attention import reference as window_attention_reference
from kernels.window.attention import windowed_attention
from pipeline.upsamplers.anyup import network as anyup_network
from pipeline.upsamplers.anyup.network import AnyUp
from pipeline.upsamplers.anyup.upsampler import AnyUpUpsampler
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.images import imagenet_normalised
from pipeline.upsamplers.interface import Upsampler
from pipeline.upsamplers.lift.network import LiFT
from pipeline.upsamplers.lift.upsampler import LiFTUpsampler
from pipeline.upsamplers.naf.network import NAF
from schemas.upsamplers import LiFTOptions

C, K, PATCH = 384, 64, 14
_LARGEST_COMPARED = 448


def upsamplers(folder: Path) -> dict[str, Upsampler]:
    backbone: Any = SimpleNamespace(num_chs=C, reduction=PATCH)

    def with_weights(name: str, network: torch.nn.Module, options: LiFTOptions | None = None) -> Upsampler:
        path = folder / f"{name}.pth"
        torch.save(network.state_dict(), path)
        return build_upsampler(name, str(path), backbone, options)

    return {
        "bilinear": build_upsampler("bilinear", None, backbone),
        "jbu": build_upsampler("jbu", None, backbone),
        "jbu, FeatUp's weights": with_weights("jbu", JBUStack(C)),
        "lift": with_weights("lift", LiFT(C, PATCH)),
        "lift, 4 iterations": with_weights("lift", LiFT(C, PATCH), LiFTOptions(lift_iterations=4)),
        "anyup": with_weights("anyup", AnyUp()),
        "naf": with_weights("naf", NAF()),
    }


def plain(upsampler: Upsampler, features: Tensor, images: Tensor, size: int, components: Tensor) -> Tensor | None:
    """Upsample all channels, then project: [B, k, size, size]; None for upsamplers without a separate plain way."""
    if isinstance(upsampler, LiFTUpsampler):
        full = upsampler.lift(features, imagenet_normalised(images))
        full = torch.nn.functional.interpolate(full, (size, size), mode="bilinear", align_corners=False)
    elif isinstance(upsampler, AnyUpUpsampler):
        anyup_network.windowed_attention = window_attention_reference.windowed_attention
        try:
            full = upsampler.anyup(features, features, imagenet_normalised(images), (size, size))
        finally:
            anyup_network.windowed_attention = windowed_attention
    else:
        return None
    return torch.einsum("kc,bchw->bkhw", components, full)


def measure(name: str, upsampler: Upsampler, size: int, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    low = size // PATCH
    features = torch.randn(1, C, low, low, generator=generator).to(device)
    images = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
    components = torch.linalg.qr(torch.randn(C, C, generator=generator))[0][:K].to(device)
    upsampler = upsampler.to(device)
    projected = upsampler.with_basis(torch.zeros(C, device=device), components).to(device)
    unprojected = upsampler.with_basis(torch.zeros(C, device=device), torch.eye(C, device=device)).to(device)
    sides: dict[str, Callable[[], Tensor | None]] = {"k": lambda: projected(features, images, (size, size))}
    expected = error = None
    if size <= _LARGEST_COMPARED:
        sides["all channels"] = lambda: unprojected(features, images, (size, size))
        expected = plain(upsampler, features, images, size, components)
    if expected is not None:
        sides["plain"] = lambda: plain(upsampler, features, images, size, components)
        error = ((sides["k"]() - expected).abs().max() / expected.abs().max()).item()
        if not error < (1e-4 if device == "cpu" else 3e-2):
            raise AssertionError(f"{name} at {size} px differs from the plain way by {error:.1e}")
    del expected
    ms = median_ms(sides, device, seconds_each=3.0, most=10, one_thread=True)
    return {
        "upsampler": name,
        "size": size,
        "output": [low, size],
        "ms": {side: round(value, 1) for side, value in ms.items()},
        "peak_bytes": {side: peak_bytes(function, device) for side, function in sides.items()},
        "error_against_plain": error,
    }


def main(sizes: tuple[int, ...] = (224, 448, 896), names: tuple[str, ...] = ()) -> None:
    """Measure; append a row per upsampler (all, or those named) and size in pixels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, upsampler in upsamplers(Path(folder)).items():
            for size in sizes if name in names or not names else ():
                row = {**measure(name, upsampler, size, device), "k": K, "C": C, "threads": 1, **rows.measured_on()}
                rows.append("upsamplers", row)
                print(json.dumps(row))


if __name__ == "__main__":
    tyro.cli(main)
