"""Which layers give the features: by default, and several at once."""

import logging
from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import JobError
from pipeline.features.backbone import build_backbone
from pipeline.features.layers import choice_label, layer_label, on_finest_grid
from tests.helpers.photographs import random_images


@pytest.fixture(autouse=True)
def _expected_warning_is_quiet() -> Iterator[None]:
    logging.getLogger("pipeline.features.backbone").setLevel(logging.ERROR)
    yield
    logging.getLogger("pipeline.features.backbone").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("name", "size", "layers", "stride"),
    [
        ("resnet18", (64, 96), (3, 4), 16),
        ("mobilenetv3_small_050", (64, 96), (3, 4), 16),
        ("tf_efficientnet_lite0", (64, 96), (3, 4), 16),
        ("convnext_atto", (64, 96), (2, 3), 16),
        ("swin_tiny_patch4_window7_224", (96, 160), (2, 3), 16),
        ("hrnet_w18_small", (64, 96), (3, 4), 16),
        ("vit_tiny_patch16_224", (96, 160), (11,), 16),
        ("vit_small_patch14_dinov2", (70, 98), (11,), 14),
        ("vit_small_patch8_224", (64, 96), (11,), 8),
        ("vit_base_patch32_clip_224", (96, 160), (11,), 32),
    ],
)
def test_the_default_is_the_last_layer_and_one_that_is_fine_enough(
    name: str, size: tuple[int, int], layers: tuple[int, ...], stride: int
) -> None:
    backbone = build_backbone(name, size=size, weights="random")
    assert (backbone.layers, backbone.reduction) == (layers, stride)


@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("vit_tiny_patch16_224", (96, 160), (8, 9, 10, 11)),
        ("vit_small_patch14_reg4_dinov2", (70, 98), (5, -1)),
        ("resnet18", (65, 97), (1, 2, 3, 4)),
        ("convnext_atto", (64, 96), (-1, -2)),
        ("swin_tiny_patch4_window7_224", (96, 160), (1, 3)),
    ],
)
def test_several_layers_are_those_of_one_pass_each(name: str, size: tuple[int, int], layers: tuple[int, ...]) -> None:
    images = random_images(2, size)
    together = build_backbone(name, size=size, weights="random", layer=layers)
    alone = [build_backbone(name, size=size, weights="random", layer=layer) for layer in together.layers]
    assert together.layer == [one.layer for one in alone] == sorted(one.layer for one in alone)
    assert together.grid == max(one.grid for one in alone)
    assert together.num_chs == sum(one.num_chs for one in alone)
    expected = on_finest_grid([one(images) for one in alone], [one.reduction for one in alone])
    features = together(images)
    assert features.shape == (2, together.num_chs, *together.grid)
    assert features.is_contiguous()
    torch.testing.assert_close(features, expected)
    assert together.identity() == {**alone[0].identity(), "layer": together.layer}
    assert together.label == f"{name} at layers {', '.join(map(str, together.layers))}"


def test_layers_of_one_grid_are_only_concatenated() -> None:
    maps = [torch.randn(1, channels, 3, 5) for channels in (2, 4)]
    assert torch.equal(on_finest_grid(maps, (14, 14)), torch.cat(maps, 1))


@pytest.mark.parametrize(("height", "width"), [(65, 97), (64, 64), (33, 130), (17, 200)])
@pytest.mark.parametrize("strides", [(2, 4), (8, 32), (16, 4, 8), (4, 12)])
def test_coarser_layers_are_placed_by_their_pixels(height: int, width: int, strides: tuple[int, ...]) -> None:
    """Layers whose channels are the pixel coordinates of their cells' centres agree, but for the outermost cells."""

    def centres(stride: int) -> torch.Tensor:
        y, x = ((torch.arange(-(-length // stride)) + 0.5) * stride for length in (height, width))
        return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]

    placed = on_finest_grid([centres(stride) for stride in strides], strides)
    finest, coarsest = min(strides), max(strides)
    assert placed.shape == (1, 2 * len(strides), -(-height // finest), -(-width // finest))
    expected = centres(finest)
    inside = ((expected > coarsest / 2) & (expected < torch.tensor([height, width]).view(2, 1, 1) - coarsest)).all(1)
    for i in range(len(strides)):
        difference = (placed[:, 2 * i : 2 * i + 2] - expected).abs().amax(1)
        assert difference[inside].numel() == 0 or difference[inside].max() < 1e-3
        assert difference.max() <= coarsest


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [
        ("resnet18", (1, 5), "got layer 5, expected -5 to 4. Its layers are 0: 64 channels, stride 2"),
        ("resnet18", (1, -4), "layers 1, -4, which name one twice"),
        ("samvit_base_patch16", (5, 11), "the last one is given after SAM's neck"),
    ],
)
def test_layers_that_do_not_go_together(name: str, layers: tuple[int, ...], words: str) -> None:
    with pytest.raises(JobError, match=words):
        build_backbone(name, size=(96, 160), weights="random", layer=layers)


def test_labels() -> None:
    assert (layer_label(3), layer_label([8, 11])) == ("layer 3", "layers 8, 11")
    assert (choice_label("resnet18", 3), choice_label("vit", [8, 11])) == ("resnet18@3", "vit@8,11")
