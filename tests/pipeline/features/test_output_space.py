"""pipeline/features/output_space.py: heads against the models' own forward pass, values against their weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.features import output_space
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.checkpoints import state_digest
from pipeline.features.layers import identity_label
from tests.helpers.photographs import random_images


def perturbed(name: str, **arguments: Any) -> nn.Module:
    """A model none of whose parameters, of its head neither, are zeros or ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture
def at_head(tmp_path: Path) -> Any:
    """Build a backbone in the space of its head from a file of perturbed weights, as timm publishes them."""

    def build(name: str, size: tuple[int, int], **arguments: Any) -> Backbone:
        full = perturbed(name)
        save_file(full.state_dict(), tmp_path / "w.safetensors")
        return build_backbone(
            name, size=size, weights=str(tmp_path / "w.safetensors"), **({"space": "head"} | arguments)
        )

    return build


def logits(backbone: Backbone, images: Tensor) -> Tensor:
    """The whole model's own output: [B, K]."""
    with torch.inference_mode():
        return backbone.model(backbone.normalise(images))


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("resnet18", (64, 96), (2, 3)),
        ("tf_efficientnet_lite0", (65, 97), (3, 4)),  # its last convolution, norm and activation come before its head
        ("densenet121", (64, 96), (2, 3)),
        ("hrnet_w18_small", (64, 96), (2, 3)),
        ("swin_tiny_patch4_window7_224", (96, 160), (3, 5)),  # height, width, channels
    ],
)
def test_the_mean_of_the_scores_is_the_score_of_the_mean(at_head: Any, name: str, size: Any, grid: Any) -> None:
    """For models that pool by averaging before linear layers alone: class activation maps (Zhou et al., CVPR 2016)."""
    backbone = at_head(name, size)
    images = random_images(2, size)
    scores = backbone(images)
    assert scores.shape == (2, 1000, *grid)
    assert (scores.dtype, scores.is_contiguous(), backbone.grid, backbone.num_chs) == (torch.float32, True, grid, 1000)
    assert scores.flatten(2).std(2).min() > 0
    assert_near(scores.mean((2, 3)), logits(backbone, images))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("convnext_atto", 32),  # norm after pooling
        ("mobilenetv3_small_050", 32),  # convolution and activation after pooling
        ("mambaout_femto", 32),  # height, width, channels
        ("vit_little_patch16_reg4_gap_256", 16),  # norm after pooling, without class token
        ("vit_base_patch16_siglip_224", 16),  # pooling by attention
    ],
)
def test_one_position_is_the_whole_model(at_head: Any, name: str, side: int) -> None:
    """For heads with more than linear layers after the pooling."""
    backbone = at_head(name, (side, side))
    images = random_images(2, (side, side))
    output = backbone(images)
    assert output.shape[2:] == (1, 1)
    assert_near(output[:, :, 0, 0], logits(backbone, images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_base_patch16_clip_224"])
def test_class_tokens_give_what_the_model_gives(at_head: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    backbone = at_head(name, (32, 48))
    images = random_images(2, (32, 48))
    forward = backbone.model.forward_features
    expected = logits(backbone, images)
    monkeypatch.setattr(backbone.model, "forward_features", lambda pixels: _with_class_tokens(forward(pixels)))
    output = backbone(images)
    assert_near(output, expected[:, :, None, None].expand_as(output))


def _with_class_tokens(tokens: Tensor) -> Tensor:
    """The class token at each position, and no sense in its own place."""
    return torch.cat([torch.full_like(tokens[:, :1], 7), tokens[:, :1].expand(-1, tokens.shape[1] - 1, -1)], dim=1)


def test_both_heads_of_a_distilled_vit_count(at_head: Any) -> None:
    backbone = at_head("deit_tiny_distilled_patch16_224", (32, 48))
    images = random_images(1, (32, 48))
    model: Any = backbone.model
    with torch.inference_mode():
        tokens = model.forward_features(backbone.normalise(images))[:, 2:]
        expected = (model.head(tokens) + model.head_dist(tokens)) / 2
    assert_near(backbone(images), expected.mT.reshape(1, 1000, 2, 3))


@pytest.mark.parametrize("facet", ["token", "value"])
def test_many_positions_are_computed_in_parts(at_head: Any, monkeypatch: pytest.MonkeyPatch, facet: str) -> None:
    backbone = at_head("vit_tiny_patch16_224", (48, 64), facet=facet)
    images = random_images(2, (48, 64))
    expected = backbone(images)
    monkeypatch.setattr(output_space, "_AT_ONCE", 5)
    assert_near(backbone(images), expected)


# --- Values ---


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", (32, 48)),
        ("vit_small_patch14_reg4_dinov2", (28, 42)),  # registers, layer scale
        ("vit_small_patch16_dinov3", (32, 48)),  # Eva: rotary positions, layer scale, no bias
        ("eva02_tiny_patch14_224", (28, 42)),  # Eva: biases apart
    ],
)
@torch.inference_mode()
def test_values_are_the_last_blocks(name: str, size: tuple[int, int]) -> None:
    full = perturbed(name, num_classes=0, dynamic_img_size=True)
    backbone = build_backbone(name, size=size, weights="random", facet="value")
    backbone.model.load_state_dict(full.state_dict())
    images = random_images(2, size)
    entered: list[Tensor] = []
    block: Any = full.blocks[-1]
    block.register_forward_pre_hook(lambda module, arguments: entered.append(arguments[0]))
    full(backbone.normalise(images))
    normed = block.norm1(entered[0][:, full.num_prefix_tokens :])
    weight, bias = block.attn.qkv.weight.chunk(3)[2], block.attn.qkv.bias
    bias = block.attn.v_bias if bias is None else bias.chunk(3)[2]
    values = F.linear(normed, weight, bias)
    values = block.attn.proj(block.attn.norm(values))
    scale = block.ls1.gamma if hasattr(getattr(block, "ls1", None), "gamma") else getattr(block, "gamma_1", None)
    expected = (values if scale is None else values * scale).mT.unflatten(-1, backbone.grid)
    assert_near(backbone(images), expected)
    assert backbone.label == f"{name} at layer 11 (value)"


def test_values_need_no_head(tmp_path: Path) -> None:
    headless = build_backbone("vit_tiny_patch16_224", size=(32, 32), weights="random")
    values = build_backbone("vit_tiny_patch16_224", size=(32, 32), weights="random", facet="value")
    assert values.digest == headless.digest
    assert values.num_chs == 192


# --- Identity, weights, layers ---


def test_a_default_identity_says_nothing_of_spaces() -> None:
    """So that the configuration hashes of stores made before there were spaces stay."""
    plain = build_backbone("vit_tiny_patch16_224", size=(32, 32), weights="random").identity()
    same = build_backbone("vit_tiny_patch16_224", size=(32, 32), weights="random", space="layer", facet="token")
    assert json.dumps(same.identity()) == json.dumps(plain)
    assert list(plain) == ["name", "layer", "weights", "mean", "std", "norm"]


def test_identities_tell_spaces_and_facets_apart(at_head: Any) -> None:
    name = "vit_tiny_patch16_224"
    plain = build_backbone(name, size=(32, 32), weights="random")
    value = build_backbone(name, size=(32, 32), weights="random", facet="value")
    head, both = at_head(name, (32, 32)), at_head(name, (32, 32), facet="value")
    assert value.identity() == plain.identity() | {"facet": "value", "norm": False}
    assert head.identity() == plain.identity() | {"space": "head", "weights": head.digest}
    assert both.identity() == head.identity() | {"facet": "value"}
    assert head.digest == state_digest(perturbed(name).state_dict())
    assert identity_label(both.identity()) == "layer 11 (value, head)"
    assert head.label == f"{name} at layer 11 (head)"


def test_the_last_layer_alone_is_the_default() -> None:
    backbone = build_backbone("resnet18", size=(64, 64), weights="random", space="head")
    assert (backbone.layer, backbone.reduction) == (4, 32)
    again = build_backbone("resnet18", size=(64, 64), weights="random", space="head", layer=-1)
    assert again.identity() == backbone.identity()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("head.bias"), "1 missing from the weights: head.bias"),
        (lambda state: state.update({"head.scale": torch.zeros(1)}), "1 not in the model: head.scale"),
        (lambda state: state.update({"head_dist.weight": torch.zeros(1)}), "1 not in the model: head_dist.weight"),
        (
            lambda state: state.update({"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}),
            r"head.weight (got [10, 192] float32, expected [1000, 192] float32)",
        ),
        (lambda state: state["head.weight"].fill_(torch.nan), "1 with NaN or infinity: head.weight"),
    ],
)
def test_weights_of_the_head_load_strictly(tmp_path: Path, spoil: Any, words: str) -> None:
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    spoil(state)
    save_file(state, tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    with pytest.raises(JobError, match=re.escape(words)):
        build_backbone("vit_tiny_patch16_224", size=(32, 32), weights=file, space="head")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("vit_small_patch14_dinov2", {"space": "head"}, "expected a model with a head.*Omit --space, or use a class"),
        ("vit_base_patch16_siglip_gap_224", {"space": "head"}, "expected a model with a head"),
        (
            "vit_tiny_patch16_224",
            {"space": "head", "layer": 10},
            "--space head with layer 10, expected the last layer, 11",
        ),
        ("vit_tiny_patch16_224", {"facet": "value", "layer": 0}, "--facet value with layer 0"),
        ("resnet18", {"space": "head", "layer": (3, 4)}, "layer 3, 4, expected the last layer, 4, alone"),
        ("resnet18", {"space": "head", "layer": 9}, "got layer 9, expected -5 to 4"),
        ("resnet18", {"facet": "value"}, "expected a plain ViT.*timm's ResNet is none"),
        ("swin_tiny_patch4_window7_224", {"facet": "value"}, "timm's SwinTransformer is none"),
        ("vit_relpos_small_patch16_224", {"facet": "value"}, "timm's VisionTransformerRelPos is none"),
        ("resnet50_clip.openai", {"space": "head"}, "uses where on the map a vector is"),
        ("crossvit_tiny_240", {"space": "head", "size": (240, 240)}, "got list before .* expected a map of 15×15"),
        ("volo_d1_224", {"space": "head"}, "got 1 × 197 × 384 before .* as many tokens after 0 others"),
        ("vit_tiny_patch16_224", {"space": "head", "size": (230, 224)}, "height 230 use 224 or 240"),
    ],
)
def test_refuses(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        build_backbone(name, **({"size": (224, 224), "weights": "random"} | arguments))


def test_all_is_checked_before_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.features.backbone.pretrained_state", lambda *_: pytest.fail("fetched"))
    for name in ("vit_small_patch14_dinov2", "resnet50_clip.openai"):
        with pytest.raises(JobError, match="--space head"):
            build_backbone(name, size=(224, 224), space="head")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"space": "head"}),
        ("vit_tiny_patch16_224", {"space": "head", "facet": "value"}),
        ("vit_tiny_patch16_224", {"facet": "value"}),
        ("vit_base_patch16_siglip_224", {"space": "head"}),
    ],
)
def test_gpu_agrees_with_cpu(name: str, arguments: dict[str, Any]) -> None:
    backbone = build_backbone(name, size=(96, 160), weights="random", **arguments)
    images = random_images(4, (96, 160))
    expected = backbone(images)
    got = backbone.cuda()(images.cuda())
    assert got.dtype == torch.float32
    assert (got.cpu() - expected).norm() < 0.05 * expected.norm()  # bfloat16 has 8 bits of mantissa
