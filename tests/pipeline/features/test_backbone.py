"""pipeline/features/backbone.py: every family of timm's that we name, their geometry, and what is refused."""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.features.checkpoints import state_digest
from tests.helpers.photographs import random_images

# name, (H, W), {layer: (channels, stride)}: the last, and one inside.
FAMILIES = [
    ("resnet18", (64, 96), {-1: (512, 32), 2: (128, 8)}),
    ("wide_resnet50_2", (64, 96), {-1: (2048, 32), -2: (1024, 16)}),
    ("resnext50_32x4d", (64, 96), {-1: (2048, 32), 0: (64, 2)}),
    ("res2net50_14w_8s", (64, 96), {-1: (2048, 32), 3: (1024, 16)}),
    ("resnest14d", (64, 96), {-1: (2048, 32), 3: (1024, 16)}),
    ("densenet121", (64, 96), {-1: (1024, 32), 3: (1024, 16)}),
    ("rdnet_tiny", (64, 96), {-1: (1040, 32), 2: (744, 16)}),
    ("vgg11", (64, 96), {-1: (512, 32), 4: (512, 16)}),
    ("mobilenetv3_small_050", (64, 96), {-1: (288, 32), 3: (24, 16)}),
    ("tf_efficientnet_lite0", (64, 96), {-1: (320, 32), 3: (112, 16)}),
    ("convnext_atto", (64, 96), {-1: (320, 32), 2: (160, 16)}),
    ("convnextv2_atto", (64, 96), {-1: (320, 32), 2: (160, 16)}),
    ("swin_tiny_patch4_window7_224", (96, 160), {-1: (768, 32), 2: (384, 16)}),
    ("swinv2_tiny_window8_256", (96, 160), {-1: (768, 32), 2: (384, 16)}),
    ("hrnet_w18_small", (64, 96), {-1: (1024, 32), 1: (128, 4)}),
    ("vit_tiny_patch16_224", (96, 160), {-1: (192, 16), 5: (192, 16)}),
    ("deit_tiny_distilled_patch16_224", (96, 160), {-1: (192, 16), 5: (192, 16)}),
    ("vit_small_patch16_224.dino", (96, 160), {-1: (384, 16), 5: (384, 16)}),
    ("vit_small_patch14_dinov2", (70, 98), {-1: (384, 14), 8: (384, 14)}),
    ("vit_small_patch14_reg4_dinov2", (70, 98), {-1: (384, 14), 8: (384, 14)}),
    ("vit_small_patch16_dinov3", (96, 160), {-1: (384, 16), 5: (384, 16)}),
    ("vit_base_patch32_clip_224", (96, 160), {-1: (768, 32)}),
    ("vit_base_patch16_siglip_224", (96, 160), {-1: (768, 16)}),
    ("samvit_base_patch16", (96, 160), {-1: (256, 16), 5: (768, 16)}),  # last: after the neck
    ("beit_base_patch16_224", (96, 160), {-1: (768, 16)}),
    ("hiera_tiny_224", (224, 224), {-1: (768, 32), 2: (384, 16)}),
]


@pytest.fixture(autouse=True)
def _expected_warning_is_quiet():
    logging.getLogger("pipeline.features.backbone").setLevel(logging.ERROR)
    yield
    logging.getLogger("pipeline.features.backbone").setLevel(logging.NOTSET)


@pytest.mark.parametrize(("name", "size", "layers"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_family(name, size, layers):
    for layer, (channels, stride) in layers.items():
        backbone = build_backbone(name, size=size, weights="random", layer=layer)
        features = backbone(random_images(1, size))
        assert (backbone.num_chs, backbone.reduction) == (channels, stride)
        assert backbone.grid == (size[0] // stride, size[1] // stride)
        assert features.shape == (1, channels, *backbone.grid)  # and no room for class or register tokens
        assert features.dtype == torch.float32
        assert features.is_contiguous()
        assert features.isfinite().all()
        assert features.std() > 0
        assert 0 <= backbone.layer == layer % len(backbone.model.feature_info)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "vit_tiny_patch16_224",
        "vit_small_patch16_dinov3",
        "vit_small_patch14_reg4_dinov2",
        "samvit_base_patch16",
        "beit_base_patch16_224",
        "levit_128s",  # only its own size (timm resamples nothing for it); its classifier has a norm of its own
    ],
)
def test_a_checkpoint_of_the_pretrained_size_loads_at_another(tmp_path, name):
    full = timm.create_model(name)  # as timm publishes it: own size, with its classifier
    size = {"vit_small_patch14_reg4_dinov2": (70, 98), "levit_128s": (224, 224)}.get(name, (128, 192))
    save_file(full.state_dict(), tmp_path / "w.safetensors")
    backbone = build_backbone(name, size=size, weights=str(tmp_path / "w.safetensors"))
    assert backbone(random_images(1, size)).isfinite().all()


def test_relative_positions_are_resampled_in_place(tmp_path):
    """BEiT's tables: what rises along x before, rises along x after, and is odd about 0 (see _quiet_resampling)."""
    state = timm.create_model("beit_base_patch16_224").state_dict()
    name = "blocks.0.attn.relative_position_bias_table"
    ramp = torch.arange(-13.0, 14).repeat(27)  # 27×27 offsets of a 14×14 window, x fastest
    state[name][:-3] = ramp[:, None]
    save_file(state, tmp_path / "w.safetensors")
    backbone = build_backbone("beit_base_patch16_224", size=(128, 192), weights=str(tmp_path / "w.safetensors"))
    table = backbone.model.state_dict()[name][:-3, 0].reshape(15, 23)
    torch.testing.assert_close(table, table[:1].expand(15, 23))
    torch.testing.assert_close(table, -table.flip(1), atol=1e-4, rtol=0)
    assert (table.diff(dim=1) > 0).all()
    assert 10 < table[0, -1] <= 13  # in a smaller window an offset means nearly what it meant


def test_spatial_order_is_that_of_the_image():
    backbone = build_backbone("vit_small_patch14_reg4_dinov2", size=(70, 98), weights="random", layer=0)
    images = random_images(1, (70, 98))
    changed = images.clone()
    changed[:, :, 28:42, 70:84] = 255 - changed[:, :, 28:42, 70:84]  # the patch in row 2, column 5
    moved = (backbone(images) - backbone(changed)).abs().sum(1)[0]  # [h, w]
    assert divmod(int(moved.argmax()), moved.shape[1]) == (2, 5)


def test_vit_features_are_after_the_final_norm():
    backbone = build_backbone("vit_tiny_patch16_224", size=(96, 160), weights="random", layer=3)
    features = backbone(random_images(2, (96, 160)))  # LayerNorm at initialisation: every token has mean 0, variance 1
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 6, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(1, correction=0), torch.ones(2, 6, 10), atol=1e-3, rtol=0)


def test_convnet_takes_any_size_and_rounds_up():
    backbone = build_backbone("tf_efficientnet_lite0", size=(65, 97), weights="random", layer=-1)
    assert backbone.grid == (3, 4)
    assert backbone.reduction == 32


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return build_backbone("resnet18", size=(64, 96), weights="random", layer=-2)


def test_normalise_is_timms(resnet):
    images = random_images(2, (64, 96))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(resnet.normalise(images), (images / 255 - mean) / std)


def test_same_batch_same_features_and_still_frozen_inside_a_training_module(resnet):
    images = random_images(3, (64, 96))
    first = resnet(images)
    torch.nn.Sequential(resnet).train()
    assert not any(module.training for module in resnet.modules())
    assert torch.equal(resnet(images), first)
    assert not any(p.requires_grad for p in resnet.parameters())


def test_features_can_be_trained_on(resnet):
    weight = torch.ones(1, requires_grad=True)
    (resnet(random_images(1, (64, 96))) * weight).sum().backward()  # an inference tensor would raise here
    assert weight.grad is not None


def test_random_weights_are_the_same_and_leave_the_callers_generator_alone(resnet):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    again = build_backbone("resnet18", size=(32, 32), weights="random")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.digest == resnet.digest == state_digest(again.model.state_dict())


def test_random_weights_are_announced(caplog):
    logging.getLogger("pipeline.features.backbone").setLevel(logging.NOTSET)
    build_backbone("resnet18", size=(32, 32), weights="random")
    assert "random weights" in caplog.text


def test_identity_is_json_and_tells_backbones_apart(resnet):
    identity = json.loads(json.dumps(resnet.identity()))
    assert identity == {
        "name": "resnet18",
        "layer": 3,
        "weights": resnet.digest,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "norm": True,
    }
    assert build_backbone("resnet18", size=(64, 96), weights="random", layer=-1).identity() != identity


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 64, 96),
        torch.zeros(3, 64, 96, dtype=torch.uint8),
        torch.zeros(1, 1, 64, 96, dtype=torch.uint8),
        torch.zeros(1, 3, 96, 64, dtype=torch.uint8),
    ],
    ids=["float", "unbatched", "grey", "transposed"],
)
def test_forward_refuses_other_images(resnet, images):
    with pytest.raises(ValueError, match=r"expected \[B, 3, 64, 96\] torch.uint8"):
        resnet(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_gpu_agrees_with_cpu(name):
    backbone = build_backbone(name, size=(96, 160), weights="random")
    images = random_images(4, (96, 160))
    expected = backbone(images)
    got = backbone.cuda()(images.cuda())
    assert got.dtype == torch.float32
    error = (got.cpu() - expected).norm() / expected.norm()
    assert error < 0.03  # bfloat16 has 8 bits of mantissa


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet5O", {}, "Similar names: resnet50"),
        ("dinov2_vits14", {}, "not a model of timm"),
        ("vit_small_patch14_dinov2.lvd143m", {}, r"unknown tag.*vit_small_patch14_dinov2\.lvd142m"),
        ("vit_tiny_patch16_224_in21k", {}, r"renamed.*'vit_tiny_patch16_224\.augreg_in21k'"),
        (
            "resnet18",
            {"layer": 5},
            r"layer 5, expected -5 to 4\. .*0: 64 channels, stride 2.* 4: 512 channels, stride 32",
        ),
        ("resnet18", {"layer": -6}, "layer -6"),
        ("resnet18", {"size": (0, 224)}, "positive"),
        ("vit_small_patch14_dinov2", {"size": (230, 224)}, "height 230 use 224 or 238"),
        ("swin_tiny_patch4_window7_224", {"size": (224, 225)}, "width 225 use 224 or 228"),
        ("beit_base_patch16_224", {"size": (100, 40)}, "height 100 use 96 or 112, for width 40 use 32 or 48"),
        ("vit_tiny_patch16_224", {"size": (8, 224)}, r"height 8 use 16\."),
        ("vgg11", {"size": (8, 8)}, "got images of 8×8 pixels, on which it does not run"),
        ("levit_128s", {"size": (225, 224)}, "got images of 225×224 pixels, on which it does not run"),
        ("inception_v3", {"size": (299, 299)}, "does not cover the image evenly"),
        ("resnet18", {"weights": "/nowhere/w.pth"}, "no such file"),
        ("resnet10t.nope", {"weights": "pretrained"}, "unknown tag"),
        ("efficientnet_b8", {"weights": "pretrained"}, "publishes no pretrained weights"),
    ],
)
def test_refuses(name, arguments, message):
    with pytest.raises(JobError, match=message):
        build_backbone(name, **({"size": (224, 224), "weights": "random"} | arguments))


def test_all_else_is_checked_before_weights_are_fetched(monkeypatch):
    monkeypatch.setattr("pipeline.features.backbone.pretrained_state", lambda *_: pytest.fail("fetched"))
    for arguments in ({"size": (230, 230)}, {"layer": 12}):
        with pytest.raises(JobError):
            build_backbone("vit_small_patch14_dinov2", **({"size": (224, 224)} | arguments))
