"""Claim: which upsampler makes the best features, for the passes that it takes: a linear probe and held-out views.

    python -m benchmarks.upsamplers.quality
    python -m benchmarks.upsamplers.quality --components 10000 --methods bilinear jbu anyup multiview
    python -m benchmarks.upsamplers.quality --size 448 --methods bilinear jbu anyup multiview

Photographs of coco200; a linear probe (`benchmarks.upsamplers.probe`) trained on one half and evaluated on the other;
the error on held-out views (`benchmarks.upsamplers.held_out`) of the second half's photographs. Multiview is fitted as
the main job fits it. At the same number of passes, two controls: shifted images whose features are interleaved, and
the mean of all views carried back to the image; and the image at twice its size, which takes four times the tokens or
pixels in one pass.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.upsamplers import probe
from benchmarks.upsamplers.held_out import BACKBONES, SHARED, SIZE, Judge, K, build, fitted_basis, fitted_to_photos
from benchmarks.upsamplers.passes import enlarged, mean_of_views, strided
from pipeline.evaluate.bootstrap import Estimate, paired
from pipeline.evaluate.probe import accuracy, mean_iou, share
from pipeline.run.feature_worker import pick_device
from pipeline.upsamplers.build import build_upsampler
from pipeline.upsamplers.fitting import UpsamplerFit
from pipeline.upsamplers.interface import Projected, Upsampler
from schemas.upsamplers import JBUOptions, MultiviewOptions

BASELINE = "bilinear"
ANYUP = str(SHARED / "weights" / "anyup_multi_backbone.pth")
BATCH = 8
STRIDE_PX = 4  # of the grid of the mean of views, as in multiview
Basis = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """A way to high-res features.

    Attributes:
        high: photographs [B, 3, H, W] to features [B, k, H, W].
        passes: of the backbone, per image.
        less_bias: whether the positional bias is subtracted: held-out views are then predicted with it.
    """

    high: Callable[[Tensor], Tensor]
    passes: int
    less_bias: bool = False


class Methods:
    """The methods for one backbone and size, built one at a time."""

    def __init__(self, name: str, size: tuple[int, int], components: int, device: torch.device) -> None:
        self.name, self.size, self.device = name, size, device
        self.backbone = build(name, device, size)
        self.basis: Basis = fitted_basis(self.backbone, device, components)
        self._fits: dict[int, UpsamplerFit] = {}
        self.fit = self.fitted(9)[1]
        self.judge = Judge(
            self.backbone, self.fit.settings["sigma_px"], torch.tensor(self.fit.arrays["bias"]), self.basis
        )

    def fitted(self, views: int, **options: Any) -> tuple[Upsampler, UpsamplerFit]:
        """Multiview, fitted to photographs; the options are such that no fit depends on."""
        upsampler = build_upsampler("multiview", None, self.backbone, MultiviewOptions(views=views, **options))
        if views not in self._fits:
            self._fits[views] = fitted_to_photos(upsampler.to(self.device), self.basis, self.size)
        return upsampler.fitted(self._fits[views]), self._fits[views]

    def projected(self, upsampler: Upsampler) -> Projected:
        return upsampler.to(self.device).with_basis(*self.basis).to(self.device)

    def single(
        self, name: str, weights: str | None = None, less: Tensor | None = None, options: object = None
    ) -> Method:
        """An upsampler of one pass, of the backbone's features less a bias [C, h, w]."""
        stage = self.projected(build_upsampler(name, weights, self.backbone, options))

        def high(photos: Tensor) -> Tensor:
            features = self.backbone(photos)
            return stage(features if less is None else features - less, photos, self.size)

        return Method(high, 1, less is not None)

    def multiview(self, views: int, **options: Any) -> Method:
        stage = self.projected(self.fitted(views, **options)[0])
        return Method(lambda photos: stage(self.backbone(photos), photos, self.size), views, True)

    def interpolated(self, function: Callable[[Tensor], Tensor], passes: int) -> Method:
        def high(photos: Tensor) -> Tensor:
            return F.interpolate(function(photos), self.size, mode="bilinear", align_corners=False)

        return Method(high, passes)

    def twice(self, name: str) -> Method:
        """An upsampler of the features of the image at twice its size."""
        larger = (2 * self.size[0], 2 * self.size[1])
        backbone = build(self.name, self.device, larger)
        stage = self.projected(build_upsampler(name, None, backbone))
        return Method(lambda photos: stage(backbone(enlarged(photos, 2)), photos, self.size), 4)

    def bias(self) -> Tensor:
        """The fitted bias in all channels that the components can express: [C, h, w]."""
        return torch.einsum("khw,kc->chw", self.judge.bias, self.basis[1])

    def all(self) -> dict[str, Callable[[], Method]]:
        """Every method by its name; the baseline is the first."""
        grid = (self.size[0] // STRIDE_PX, self.size[1] // STRIDE_PX)
        sigma_px = self.fit.settings["sigma_px"]
        return {
            BASELINE: lambda: self.single("bilinear"),
            "jbu": lambda: self.single("jbu"),
            "jbu, wide kernels": lambda: self.single("jbu", options=JBUOptions(jbu_kernels="wide")),
            "bilinear, less the bias": lambda: self.single("bilinear", less=self.bias()),
            "jbu, less the bias": lambda: self.single("jbu", less=self.bias()),
            "anyup": lambda: self.single("anyup", ANYUP),
            "anyup, less the bias": lambda: self.single("anyup", ANYUP, less=self.bias()),
            "bilinear, image at 2×": lambda: self.twice("bilinear"),
            "jbu, image at 2×": lambda: self.twice("jbu"),
            "strided, 9 passes": lambda: self.interpolated(strided(self.backbone, self.basis, 3), 9),
            "mean of 9 views": lambda: self.interpolated(
                mean_of_views(self.backbone, self.basis, 9, grid, sigma_px), 9
            ),
            "multiview, 5 views": lambda: self.multiview(5),
            "multiview": lambda: self.multiview(9),
            "multiview, 21 views": lambda: self.multiview(21),
            "multiview, not smoothed": lambda: self.multiview(9, smoothing=0.0),
            "multiview, smoothed more": lambda: self.multiview(9, smoothing=30.0),
            "multiview, wide kernels": lambda: self.multiview(9, jbu_kernels="wide"),
            "multiview, smoothed more, wide kernels": lambda: self.multiview(9, smoothing=30.0, jbu_kernels="wide"),
        }


def measure(methods: Methods, names: Sequence[str], photos: int, runs: int) -> None:
    """Evaluate methods of a backbone, and write a row each."""
    size, device = methods.size, methods.device
    train, val = probe.with_frequent_classes(*(probe.labelled(part, photos, device, size) for part in ("train", "val")))
    draws = probe.draws_of(runs, photos)
    seen = [methods.judge.seen(photo) for photo, _ in val]
    counts, border, errors, facts = {}, {}, {}, {}
    for name in names:
        method = methods.all()[name]()
        high, seconds = computed(method.high, [photo for photo, _ in train + val])
        counts[name], border[name] = probe.evaluated(high, probe.trained(high, train, draws), val)
        errors[name] = torch.tensor([
            methods.judge.error(high(photo).float(), views, method.less_bias)[0]
            for (photo, _), views in zip(val, seen, strict=True)
        ])[None, :, None]  # fmt: skip
        facts[name] = {"passes": method.passes, "seconds": round(seconds, 5)}
        print(methods.name, name, f"{mean_iou(counts[name].double().sum(1)).mean():.4f}", flush=True)
    metrics = {
        "miou": paired(counts, mean_iou, BASELINE),
        "accuracy": paired(counts, accuracy, BASELINE),
        "border_accuracy": paired(border, share, BASELINE),
        "held_out_error": paired(errors, lambda summed: summed[:, 0] / photos, BASELINE),
    }
    for name in names:
        row: dict[str, Any] = {"backbone": methods.name, "method": name, "size": size[0], "photos": photos}
        row |= {"runs": runs, "k": len(methods.basis[1]), **facts[name], **_figures(metrics, name)}
        if name.startswith("multiview"):
            row["fitted"] = dict(methods.fit.settings)
        rows.append("quality", {**row, **rows.measured_on()})
        print(json.dumps(row), flush=True)


def _figures(metrics: dict[str, dict[str, tuple[Estimate, Estimate]]], name: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric, of_methods in metrics.items():
        value, difference = of_methods[name]
        figures |= {metric: value.row(), f"{metric}_difference": difference.row()}
    return figures


def computed(function: Callable[[Tensor], Tensor], photos: Sequence[Tensor]) -> tuple[probe.High, float]:
    """Features of all photographs in float16, by photograph; and the median seconds of one, in batches."""
    features, seconds = dict[int, Tensor](), []
    for first in range(0, len(photos), BATCH):
        batch = photos[first : first + BATCH]
        begun = time.perf_counter()
        high = function(torch.cat(list(batch))).half()
        if high.is_cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / len(batch))
        features |= {id(photo): one for photo, one in zip(batch, high.split(1), strict=True)}
    return (lambda photo: features[id(photo)]), statistics.median(seconds)


def main(
    photos_each: int = 100,
    runs: int = 10,
    backbones: tuple[str, ...] = tuple(BACKBONES),
    size: int = SIZE[0],
    components: int = K,
    methods: tuple[str, ...] = (),
    device: str = "auto",
) -> None:
    """Measure.

    Args:
        photos_each: number of photographs of the training and of the validation part, each.
        runs: classifiers of each method.
        backbones: names in `BACKBONES`.
        size: side of the image in pixels.
        components: k; as many as there are channels if it is larger.
        methods: names of the methods, the baseline among them; none: all.
        device: "auto", "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    chosen = torch.device(pick_device(device))
    with torch.inference_mode():
        for name in backbones:
            of_backbone = Methods(name, (size, size), components, chosen)
            measure(of_backbone, methods or tuple(of_backbone.all()), photos_each, runs)


if __name__ == "__main__":
    tyro.cli(main)
