"""Evaluation of features: the error on views of photographs that no fit used, for three pretrained backbones."""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.fit_pooling import fit as fit_pooling
from kernels.multiview import ViewMatrices
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.pca import Moments, fit
from pipeline.images.decoding.decode import Geometry, decode
from pipeline.upsamplers.fitting import UpsamplerFit, fitted_on
from pipeline.upsamplers.interface import Upsampler
from pipeline.upsamplers.multiview.pooling import PoolingModel
from pipeline.upsamplers.multiview.trials import relative_error
from pipeline.upsamplers.multiview.views import held_out_views, view_operators
from pipeline.views.features import JitterMatrices, view_features
from schemas.options import FitPoolingConfig

SHARED = Path(__file__).parents[2] / "shared"
COCO = SHARED / "data" / "coco200" / "images"
SIZE, K, HELD_OUT, BASIS_PHOTOS = (224, 224), 64, 20, 60
BACKBONES: dict[str, dict[str, Any]] = {
    "lite0": {
        "backbone": "tf_efficientnet_lite0",
        "weights": str(SHARED / "weights" / "tf_efficientnet_lite0.safetensors"),
        "layer": "3",
    },
    "vit": {
        "backbone": "vit_small_patch14_dinov2.lvd142m",
        "weights": str(SHARED / "weights" / "vit_small_patch14_dinov2.focus.safetensors"),
        "layer": "10",
    },
    "vit-ti": {
        "backbone": "vit_tiny_patch16_224",
        "weights": str(SHARED / "weights" / "vit_tiny_patch16_224.safetensors"),
        "layer": "11",
    },
}


def photos(part: str, count: int, device: torch.device, size: tuple[int, int] = SIZE) -> list[Tensor]:
    """Photographs [1, 3, H, W] uint8, spread evenly over a part of coco200."""
    files = sorted((COCO / part).glob("*.jpg"))
    chosen = [files[i * len(files) // count] for i in range(count)]
    geometry = Geometry(size, "crop", size)
    return [torch.tensor(decode(path.read_bytes(), geometry).pixels, device=device)[None] for path in chosen]


def build(name: str, device: torch.device, size: tuple[int, int] = SIZE) -> Backbone:
    """Build one of `BACKBONES`."""
    options = BACKBONES[name]
    backbone = build_backbone(options["backbone"], size=size, weights=options["weights"], layer=int(options["layer"]))
    return backbone.to(device)


def fitted_basis(backbone: Backbone, device: torch.device, components: int = K) -> tuple[Tensor, Tensor]:
    """Fit mean [C] and components [k, C], fewer than asked for if C is, on the training photographs' features."""
    total = Moments.none(backbone.num_chs)
    for photo in photos("train", BASIS_PHOTOS, device, backbone.size):
        features = backbone(photo)
        total = total.merged(Moments.of(features, torch.ones_like(features[:, 0], dtype=torch.bool)))
    mean, components = fit(total, components, at_most=True).tensors
    return mean.to(device), components.to(device)


def pooling_file(folder: Path, name: str, device: str) -> str:
    """Path of a backbone's pooling model in ``folder``, fitted if missing."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = str(COCO / "train")
        fit_pooling(FitPoolingConfig(images=images, output=str(path), device=device, **BACKBONES[name]))  # type: ignore[arg-type]
    return str(path)


def fitted_to_photos(upsampler: Upsampler, basis: tuple[Tensor, Tensor], size: tuple[int, int] = SIZE) -> UpsamplerFit:
    """Fit an upsampler on training photographs as the main job does in its preparation."""
    fitting, device = upsampler.fitting(), basis[0].device
    assert fitting is not None
    samples = [fitting.sample(photo, *basis) for photo in photos("train", fitting.images, device, size)]
    sample = functools.reduce(lambda one, other: one.merged(other), filter(None, samples))
    return fitted_on(device, fitting, sample)


class Judge:
    """Evaluates features on held-out views of photographs, through one backbone's pooling model.

    Attributes:
        jitters: the views.
        basis: mean and components for projecting features.
    """

    def __init__(self, backbone: Backbone, sigma_px: float, bias: Tensor, basis: tuple[Tensor, Tensor]) -> None:
        device, size = basis[0].device, backbone.size
        self.jitters = held_out_views(size, HELD_OUT)
        self.backbone, self.basis = backbone, basis
        self.matrices = JitterMatrices.of(self.jitters, device)
        self.operators: ViewMatrices = view_operators(self.jitters, backbone.grid, size, sigma_px).to(device)
        self.bias = bias.to(device)

    @classmethod
    def of(cls, backbone: Backbone, pooling: PoolingModel, basis: tuple[Tensor, Tensor]) -> "Judge":
        """A judge with a pooling model in all channels."""
        bias = torch.einsum("chw,kc->khw", pooling.bias.to(basis[1]), basis[1])
        return cls(backbone, pooling.settings.sigma_px, bias, basis)

    def seen(self, photo: Tensor) -> Tensor:
        """The backbone's features of the views of a photograph [1, 3, H, W]: [V, k, h, w]."""
        return view_features(self.backbone, photo, self.matrices, self.basis)[0]

    def error(self, high: Tensor, seen: Tensor, with_bias: bool) -> tuple[float, float]:
        """Relative squared error and mean cosine of features [1, k, H, W]."""
        predicted = self.operators.project(high)[0] + (self.bias if with_bias else 0)
        cosine = F.cosine_similarity(predicted, seen, dim=1).mean()
        return relative_error(predicted, seen), float(cosine)
