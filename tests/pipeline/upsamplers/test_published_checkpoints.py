"""Checkpoints as their authors publish them, through the main job, against literal computations in float64.

FeatUp's JBU and AnyUp are written out here from their papers and publications, one image at a time and with no regard
to memory, so that nothing is shared with what is tested.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densefeat import FeatureStore
from jobs.upsample_imagenet import upsample
from jobs.verify_store import VerifyConfig, verify
from pipeline.errors import JobError
from pipeline.evaluate.data.originals import read_photo
from pipeline.images.decoding.decode import decode
from pipeline.run.planning.plan import make_plan
from pipeline.upsamplers.anyup.upsampler import AnyUpUpsampler
from tests.helpers.rounding import assert_close
from tests.helpers.stores import SHARED
from tests.helpers.upsample_jobs import config

WEIGHTS, COCO = SHARED / "weights", SHARED / "data" / "coco200" / "images"
ANYUP, MASKCLIP = WEIGHTS / "anyup_multi_backbone.pth", WEIGHTS / "maskclip_jbu_stack_cocostuff.ckpt"
VIT_S, VIT_TI = WEIGHTS / "vit_small_patch14_dinov2.focus.safetensors", WEIGHTS / "vit_tiny_patch16_224.safetensors"

pytestmark = pytest.mark.skipif(
    not all(place.exists() for place in (ANYUP, MASKCLIP, VIT_S, VIT_TI, COCO)),
    reason=f"the published weights and photographs of {SHARED} are not here",
)

State = dict[str, Tensor]
MASKCLIP_JOB = {
    "backbone": "vit_base_patch16_clip_quickgelu_224.openai", "layer": None, "space": "head", "facet": "value",
    "upsampler": "jbu", "upsampler_weights": str(MASKCLIP),
}  # fmt: skip
ANYUP_JOBS = {
    "vit-s": {"backbone": "vit_small_patch14_dinov2.lvd142m", "weights": str(VIT_S), "layer": None},
    "vit-ti": {"backbone": "vit_tiny_patch16_224", "weights": str(VIT_TI), "layer": None},
    "class scores": {"backbone": "vit_tiny_patch16_224", "weights": str(VIT_TI), "layer": None, "space": "head"},
}
for job in ANYUP_JOBS.values():
    job |= {"upsampler": "anyup", "upsampler_weights": str(ANYUP)}


def tensors_of(file: Path) -> State:
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor.double() for name, tensor in loaded.get("state_dict", loaded).items()}


def imagenet(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels.double() / 255 - mean) / std


def literal_jbu(state: State, features: Tensor, pixels: Tensor) -> Tensor:
    """FeatUp's stack of four stages (arXiv 2403.10516): [1, C, h, w], [1, 3, H, W] uint8 -> [1, C, 16h, 16w]."""
    image, high = imagenet(pixels), features.double()
    for number in range(1, 5):
        high = _literal_stage(state, f"upsampler.up{number}", high, image)
    mixed = F.conv2d(high, state["upsampler.fixup_proj.1.weight"], state["upsampler.fixup_proj.1.bias"])
    return high + 0.1 * mixed


def _literal_stage(state: State, stage: str, source: Tensor, image: Tensor) -> Tensor:
    size = [2 * side for side in source.shape[2:]]
    guidance = F.adaptive_avg_pool2d(image, size)

    def network(name: str, x: Tensor) -> Tensor:
        for layer in (0, 3):
            x = F.conv2d(x, state[f"{stage}.{name}.{layer}.weight"], state[f"{stage}.{name}.{layer}.bias"])
            x = F.gelu(x) if layer == 0 else x
        return x

    keys = network("range_proj", guidance)
    neighbours = F.unfold(F.pad(keys, [3] * 4, mode="reflect"), 7).view(1, keys.shape[1], 49, *size)
    products = (keys[:, :, None] * neighbours).sum(1)
    weights = torch.softmax(state[f"{stage}.range_temp"].exp().clamp(1e-4, 1e4) * products, dim=1)
    line = torch.linspace(-1, 1, 7).double()
    squares = (line[:, None] ** 2 + line[None] ** 2).view(1, 49, 1, 1)
    weights = weights * torch.exp(-squares / (2 * state[f"{stage}.sigma_spatial"] ** 2))
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-7)
    weights = weights + 0.1 * network("fixup_proj", torch.cat([weights, guidance], dim=1))
    high = F.interpolate(source, size, mode="bicubic", align_corners=False)
    padded, output = F.pad(high, [3] * 4, mode="reflect"), torch.zeros_like(high)
    for tap in range(49):
        y, x = divmod(tap, 7)
        output += weights[:, tap] * padded[:, :, y : y + size[0], x : x + size[1]]
    return output


def literal_anyup(state: State, features: Tensor, pixels: Tensor) -> Tensor:
    """AnyUp at the image's size (arXiv 2510.12764): [1, C, h, w], [1, 3, H, W] uint8 -> [1, C, H, W]."""
    features, (H, W) = features.double(), pixels.shape[2:]
    encoded = _literal_encoder(state, "image_encoder", F.conv2d(imagenet(pixels), state["image_encoder.0.weight"]))
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=torch.float64) for n in (H, W)), indexing="ij")
    angles = torch.einsum("cd,cyx->dyx", state["rope.freqs"], torch.stack([y, x]))
    a, b = encoded.chunk(2, dim=1)
    encoded = encoded * angles.cos() + torch.cat([-b, a], dim=1) * angles.sin()
    queries = _literal_encoder(state, "query_encoder", F.conv2d(encoded, state["query_encoder.0.weight"]))
    keys = _literal_encoder(state, "key_encoder", F.conv2d(encoded, state["key_encoder.0.weight"]))
    keys = F.adaptive_avg_pool2d(keys, features.shape[2:])
    keys = torch.cat([keys, _literal_encoder(state, "key_features_encoder", _literal_embedding(state, features))], 1)
    keys = F.conv2d(F.pad(keys, [1] * 4, mode="reflect"), state["aggregation.0.weight"])
    keys = _literal_encoder(state, "aggregation", keys)
    queries = F.conv2d(queries, state["cross_decode.conv2d.weight"], padding=1)
    return _literal_attention(state, queries, keys, features)


def _literal_encoder(state: State, name: str, x: Tensor) -> Tensor:
    for block in (1, 2):
        inner = x
        for norm, conv in ((0, 2), (3, 5)):
            place = f"{name}.{block}.block"
            inner = F.group_norm(inner, 8, state[f"{place}.{norm}.weight"], state[f"{place}.{norm}.bias"])
            inner = F.conv2d(F.silu(inner), state[f"{place}.{conv}.weight"])
        x = x + inner
    return x


def _literal_embedding(state: State, features: Tensor) -> Tensor:
    """As published: results are stored channel by channel, and read as if stored filter by filter."""
    (_, C, h, w), basis = features.shape, state["key_features_encoder.0.basis"]
    unit = features / features.norm(dim=1, keepdim=True)
    responses = torch.stack([F.conv2d(unit[:, c : c + 1], basis, padding=2)[0] for c in range(C)])  # [C, 128, h, w]
    ones = torch.ones(1, 1, h, w, dtype=torch.float64)
    responses = responses / F.conv2d(ones, torch.ones(1, 1, 5, 5, dtype=torch.float64), padding=2)
    return torch.softmax(responses.reshape(1, len(basis), C, h, w), dim=1).mean(2)


def _literal_attention(state: State, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    place, (H, W), (h, w) = "cross_decode.cross_attn", queries.shape[2:], keys.shape[2:]
    eps = float(np.finfo(np.float32).eps)

    def heads(x: Tensor, norm: str, part: int) -> Tensor:
        tokens = x[0].flatten(1).T
        tokens = tokens / (tokens.square().mean(1, keepdim=True) + eps).sqrt() * state[f"{place}.{norm}.weight"]
        matrix, bias = (state[f"{place}.attention.in_proj_{kind}"].chunk(3)[part] for kind in ("weight", "bias"))
        return (tokens @ matrix.T + bias).view(len(tokens), 4, 32)

    scores = torch.einsum("qnd,snd->nqs", heads(queries, "norm_q", 0), heads(keys, "norm_k", 1)) / 32**0.5
    inside = _literal_window(h, H)[:, None, :, None] & _literal_window(w, W)[None, :, None, :]
    scores = scores.masked_fill(~inside.view(H * W, h * w), -torch.inf)
    weights = torch.softmax(scores, dim=-1).mean(0)
    return (weights @ values[0].flatten(1).T).T.view(1, -1, H, W)


def _literal_window(low: int, high: int) -> Tensor:
    """[high, low]: the cells within a tenth of the axis of a pixel's centre, to both sides; in float32 as published."""
    centres, cells = (torch.arange(high, dtype=torch.float32) + 0.5) / high, torch.arange(low)
    first = torch.floor((centres - 0.1).clamp(0, 1) * low)[:, None]
    end = torch.ceil((centres + 0.1).clamp(0, 1) * low)[:, None]
    return (cells >= first) & (cells < end)


CASES = [
    pytest.param({**MASKCLIP_JOB, "size": "96x112"}, MASKCLIP, literal_jbu, 512, id="maskclip"),
    *(
        pytest.param({**job, "size": size}, ANYUP, literal_anyup, channels, id=f"anyup {name}")
        for (name, job), size, channels in zip(
            ANYUP_JOBS.items(), ("112x140", "96x112", "80x96"), (384, 192, 1000), strict=True
        )
    ),
]


@pytest.mark.parametrize(("options", "file", "literal", "channels"), CASES)
@torch.inference_mode()
def test_what_the_job_builds_is_the_published_method(
    tmp_path: Path, options: dict[str, Any], file: Path, literal: Callable[..., Tensor], channels: int
) -> None:
    plan = make_plan(config(COCO, tmp_path / "store", limit=3, dry_run=True, **options))
    assert plan.stages is not None
    backbone, upsampler = plan.stages.backbone, plan.stages.upsampler
    assert upsampler is not None
    geometry = plan.spec.recipe.images.geometry
    assert (backbone.num_chs, geometry.output_size) == (channels, backbone.size)
    for uri in plan.references["uri"].to_pylist()[:2]:
        pixels = torch.from_numpy(decode(Path(uri).read_bytes(), geometry).pixels)[None]
        features = backbone(pixels)
        expected = literal(tensors_of(file), features, pixels)
        every_channel = upsampler.with_basis(torch.zeros(channels), torch.eye(channels))
        # In float32. AnyUp's weights are exponentials of products of 32 trained numbers, which magnify rounding.
        tolerance = 1e-5 if literal is literal_jbu else 4e-5
        assert_close(every_channel(features, pixels, geometry.output_size), expected, tolerance)
        if isinstance(upsampler, AnyUpUpsampler):
            arguments = features.double(), features.double(), imagenet(pixels), geometry.output_size
            assert_close(copy.deepcopy(upsampler.anyup).double()(*arguments), expected, 1e-10)


@pytest.mark.parametrize(("options", "file", "literal", "channels"), CASES[:2])
@torch.inference_mode()
def test_the_job_stores_it(
    tmp_path: Path, options: dict[str, Any], file: Path, literal: Callable[..., Tensor], channels: int
) -> None:
    job = config(COCO, tmp_path / "store", limit=6, components=24, dtype="float16", **options)
    assert upsample(job) == 0
    assert verify(VerifyConfig(store=job.store)) == 0
    store = FeatureStore(job.store)
    assert store.components.shape == (24, channels)
    stages = make_plan(replace(job, resume=True)).stages
    assert stages is not None
    for row in (0, 5):
        pixels = torch.from_numpy(read_photo(store, row))[None]
        high = literal(tensors_of(file), stages.backbone(pixels), pixels)[0].numpy()
        expected = np.einsum("kc,chw->khw", store.components, high - store.mean[:, None, None])
        assert np.abs(store.read(row) - expected).max() < 2**-10 * np.abs(expected).max()  # of float16


def test_maskclips_checkpoint_is_for_512_channels(tmp_path: Path) -> None:
    plain = {**MASKCLIP_JOB, "size": "96x112", "space": "layer", "facet": "token"}
    with pytest.raises(JobError, match="are for features of 512 channels, the backbone outputs 768"):
        make_plan(config(COCO, tmp_path / "store", limit=3, dry_run=True, **plain))


def test_checkpoints_of_each_other_are_refused(tmp_path: Path) -> None:
    options = {**MASKCLIP_JOB, "size": "96x112"}
    with pytest.raises(JobError, match=r"anyup_multi_backbone\.pth.*not in the model"):
        make_plan(config(COCO, tmp_path / "a", limit=3, dry_run=True, **options | {"upsampler_weights": str(ANYUP)}))
    with pytest.raises(JobError, match=r"maskclip_jbu_stack_cocostuff\.ckpt.*Check that the weights are AnyUp's"):
        make_plan(config(COCO, tmp_path / "b", limit=3, dry_run=True, **options | {"upsampler": "anyup"}))
