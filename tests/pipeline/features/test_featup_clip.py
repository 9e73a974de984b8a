"""FeatUp's CLIP and MaskCLIP: the features of timm's CLIP, against their definition on OpenAI's own tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.features.backbone import build_backbone
from tests.helpers.photographs import random_images
from tests.helpers.rounding import assert_close

CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


class OpenAI:
    """The image tower of CLIP's ViT-B/16 with the published names of its tensors, and random values."""

    WIDTH, LAYERS, HEADS = 768, 12, 12

    def __init__(self) -> None:
        torch.manual_seed(0)
        width = self.WIDTH
        shapes = {"class_embedding": (width,), "positional_embedding": (197, width), "proj": (width, 512)}
        shapes |= {"conv1.weight": (width, 3, 16, 16)}
        for norm in ("ln_pre", "ln_post"):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        for block in range(self.LAYERS):
            place = f"transformer.resblocks.{block}"
            shapes |= {f"{place}.attn.in_proj_weight": (3 * width, width), f"{place}.attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{place}.attn.out_proj.weight": (width, width), f"{place}.attn.out_proj.bias": (width,)}
            shapes |= {f"{place}.mlp.c_fc.weight": (4 * width, width), f"{place}.mlp.c_fc.bias": (4 * width,)}
            shapes |= {f"{place}.mlp.c_proj.weight": (width, 4 * width), f"{place}.mlp.c_proj.bias": (width,)}
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{place}.{norm}.weight": (width,), f"{place}.{norm}.bias": (width,)}
        self.tensors = {f"visual.{name}": self._random(name, shape) for name, shape in shapes.items()}

    @staticmethod
    def _random(name: str, shape: tuple[int, ...]) -> Tensor:
        if ".ln_" in f".{name}" and name.endswith("weight"):
            return 1 + 0.1 * torch.randn(shape)
        return torch.randn(shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)

    def features(self, pixels: Tensor, *, values: bool) -> Tensor:
        """[B, 512, 14, 14]; MaskCLIP's with ``values``: featurizers/maskclip/model.py and CLIP.py of FeatUp."""
        own = {name.removeprefix("visual."): tensor for name, tensor in self.tensors.items()}
        x = F.conv2d(pixels, own["conv1.weight"], stride=16).flatten(2).mT
        x = torch.cat([own["class_embedding"].expand(len(x), 1, -1), x], dim=1) + own["positional_embedding"]
        x = self._norm(x, own, "ln_pre")
        for block in range(self.LAYERS):
            place = f"transformer.resblocks.{block}"
            inner = self._norm(x, own, f"{place}.ln_1")
            qkv = F.linear(inner, own[f"{place}.attn.in_proj_weight"], own[f"{place}.attn.in_proj_bias"])
            q, k, v = qkv.chunk(3, -1)
            out = own[f"{place}.attn.out_proj.weight"], own[f"{place}.attn.out_proj.bias"]
            if values and block == self.LAYERS - 1:
                x = F.linear(v, *out)
                break
            q, k, v = (one.unflatten(-1, (self.HEADS, -1)).transpose(1, 2) for one in (q, k, v))
            weights = torch.softmax(q @ k.mT / (self.WIDTH // self.HEADS) ** 0.5, dim=-1)
            x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), *out)
            inner = self._norm(x, own, f"{place}.ln_2")
            inner = F.linear(inner, own[f"{place}.mlp.c_fc.weight"], own[f"{place}.mlp.c_fc.bias"])
            inner = inner * torch.sigmoid(1.702 * inner)
            x = x + F.linear(inner, own[f"{place}.mlp.c_proj.weight"], own[f"{place}.mlp.c_proj.bias"])
        x = self._norm(x, own, "ln_post") @ own["proj"]
        return x[:, 1:].mT.unflatten(-1, (14, 14))

    @staticmethod
    def _norm(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenAI, str]:
    clip = OpenAI()
    file = tmp_path_factory.mktemp("clip") / "ViT-B-16.pt"
    torch.save(clip.tensors | {"ln_final.weight": torch.ones(512), "logit_scale": torch.tensor(4.6)}, file)
    return clip, str(file)


@pytest.mark.parametrize("facet", ["token", "value"])
@torch.inference_mode()
def test_featups_clip_and_maskclip(openai: tuple[OpenAI, str], facet: str) -> None:
    clip, file = openai
    backbone = build_backbone(CLIP, size=(224, 224), weights=file, space="head", facet=facet)
    images = random_images(1, (224, 224))
    assert (backbone.num_chs, backbone.grid) == (512, (14, 14))
    expected = clip.features(backbone.normalise(images), values=facet == "value")
    assert_close(backbone(images), expected, 1e-5)
