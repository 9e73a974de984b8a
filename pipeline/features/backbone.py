"""Pixels -> low-res features [B, C, h, w]: any timm model, truncated after the stages or blocks that give them."""

import contextlib
import difflib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.features.checkpoints import load_strict, read_state_dict, state_digest
from pipeline.features.hub import go_offline_if_unreachable
from pipeline.features.layers import SAM, feature_info, has_norm, layer_label, on_finest_grid, resolve_layers
from pipeline.reporting.units import listed

__all__ = ["Backbone", "build_backbone"]

_logger = logging.getLogger(__name__)

_RANDOM_SEED = 0


class Backbone(nn.Module):
    """A frozen timm model that returns the features of one layer, or of several, concatenated on the finest grid.

    The features are taken *after the model's final norm* where timm has one for that layer: at every block of a plain
    ViT (the practice of DINOv2, ``get_intermediate_layers(norm=True)``), at the last stage of Swin, ConvNeXt and RDNet
    (where timm's ``norm_pre`` may be the identity), and after SAM's neck at its last block (256 channels; inner blocks
    are raw). A ViT that pools by averaging (BEiT, EVA-02, MAE fine-tunes) normalises only the pooled features, so its
    dense features are raw. Class, distillation and register tokens are dropped.

    Always in evaluation mode and without gradients: the same batch on the same device gives the same features.

    Attributes:
        name: timm model name as requested, ``arch`` or ``arch.tag``.
        layers: indices of the layers, non-negative and ascending, as in timm's ``feature_info``.
        num_chs: C, channels of the features: of all layers together.
        reduction: stride of the features in input pixels: the smallest of the layers'.
        size: (H, W) in pixels that ``forward`` accepts.
        grid: (h, w) of the features. A ConvNet rounds up: h = ceil(H / reduction).
        norm: whether the model's final norm was requested (see above for where one exists).
    """

    def __init__(
        self, name: str, model: nn.Module, *, layers: tuple[int, ...], size: tuple[int, int], norm: bool
    ) -> None:
        """Wrap a headless timm model. Use `build_backbone` to build from a name; it documents the errors."""
        super().__init__()
        self.name, self.layers, self.size, self.norm = name, layers, size, norm
        # NHWC convolutions: lite0 takes 0.7 of the time on a CPU, and tensor cores prefer them on a GPU.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        cfg: dict[str, Any] = vars(model)["pretrained_cfg"]
        self._mean, self._std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.register_buffer("mean", 255 * torch.tensor(self._mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(self._std).view(1, 3, 1, 1), persistent=False)
        self._strides = [int(feature_info(model)[layer]["reduction"]) for layer in layers]
        self.reduction = min(self._strides)
        with torch.inference_mode():
            black = self.normalise(torch.zeros(1, 3, *size, dtype=torch.uint8))
            try:  # one image: the only reliable source of every family's strides, paddings and necks
                maps = self._maps(black)
            except Exception as error:  # timm's families reject a size with AssertionError, RuntimeError, ValueError …
                raise _refused_size(name, size, error) from error
        for features, stride in zip(maps, self._strides, strict=True):
            _check_even(name, features.shape[2:], size, stride)
        self.num_chs: int = sum(features.shape[1] for features in maps)
        self.grid: tuple[int, int] = (-(-size[0] // self.reduction), -(-size[1] // self.reduction))

    @property
    def layer(self) -> int | list[int]:
        """The layer, or the list of several: as in the identity."""
        return self.layers[0] if len(self.layers) == 1 else list(self.layers)

    @property
    def label(self) -> str:
        """Human-readable name: ``resnet18 at layer 2``."""
        return f"{self.name} at {layer_label(self.layer)}"

    @functools.cached_property
    def digest(self) -> str:
        """`pipeline.features.checkpoints.state_digest` of the weights without the classifier; computed once."""
        return state_digest(self.model.state_dict())

    def identity(self) -> dict[str, object]:
        """All that features depend on besides the pixels, JSON-serialisable, for the configuration hash."""
        return {
            "name": self.name,
            "layer": self.layer,
            "weights": self.digest,
            "mean": list(self._mean),
            "std": list(self._std),
            "norm": self.norm,
        }

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode regardless of the containing module: features must not depend on the batch."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise pixels as in the model's training: ``(images / 255 - mean) / std``.

        Args:
            images: [B, 3, H, W] uint8 RGB, on the backbone's device; any H and W.

        Returns:
            [B, 3, H, W] float32, channels_last.
        """
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        return (pixels - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch; in bfloat16 autocast on a GPU, in float32 on a CPU.

        Args:
            images: [B, 3, H, W] uint8 RGB, (H, W) = ``self.size``, on the backbone's device.

        Returns:
            [B, C, h, w] float32, contiguous, detached; not an inference tensor, so autograd may save it.

        Raises:
            ValueError: the dtype or shape is not as above.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.size):
            raise ValueError(
                f"images: got {list(images.shape)} {images.dtype}, expected [B, 3, {self.size[0]}, {self.size[1]}] "
                "torch.uint8. Decode to the size that the backbone was built for."
            )
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            maps = self._maps(self.normalise(images))
            features = maps[0] if len(maps) == 1 else on_finest_grid([one.float() for one in maps], self._strides)
        # Copied outside inference mode: autograd cannot save inference tensors.
        return features.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """The features of each layer: [B, C_i, h_i, w_i]. No later layers are computed and no others kept."""
        run: Any = self.model.forward_intermediates
        return run(  # type: ignore[no-any-return]
            pixels,
            indices=list(self.layers),
            norm=self.norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )


def build_backbone(
    name: str, *, size: tuple[int, int], weights: str = "pretrained", layer: int | Sequence[int] | None = None
) -> Backbone:
    """Build a backbone from a timm model name. Everything else is checked before any weights are fetched.

    A ViT's position embedding is resampled to the grid of ``size`` as in timm (bicubic, antialiased), Swin pads its
    windows, and other models with a fixed size are built for ``size``; a ConvNet accepts any size.

    Args:
        name: timm model, ``arch`` or ``arch.tag`` (``vit_small_patch14_dinov2.lvd142m``). The tag, or timm's default
            tag, also determines the mean and std for normalising pixels.
        size: (H, W) of the images in pixels.
        weights: ``"pretrained"`` (timm downloads them, or finds them in its cache), ``"random"`` (seed 0, for tests
            and benchmarks), or a checkpoint's path or URI, with timm's tensor names or those of an original release
            that timm can convert.
        layer: index into the model's stages (ConvNets, Swin) or blocks (ViTs); negative counts from the end. Several
            indices: their channels are concatenated, see `pipeline.features.layers.on_finest_grid`. None: a ViT's
            last block; of a network whose strides differ, the last layer and the last with a stride of at most 16.

    Returns:
        The backbone, on the CPU.

    Raises:
        JobError: the model, tag or layer is unknown; the layers do not go together; the model does not accept the
            size; or the weights cannot be fetched or do not match.
    """
    if weights == "pretrained":
        go_offline_if_unreachable()
    _check_name(name, weights)
    if min(size) < 1:
        raise JobError(f"Backbone {name!r}: got the size {size}, expected (H, W) in pixels. Give positive numbers.")
    try:
        model = _create(name, size)
    except (AssertionError, RuntimeError, ValueError) as error:  # a fixed-size model that does not support this size
        raise _refused_size(name, size, error) from error
    layers = resolve_layers(name, model, (layer,) if isinstance(layer, int) else layer)
    _check_patches(name, model, size)
    backbone = Backbone(name, model, layers=layers, size=size, norm=has_norm(model, layers))
    if weights == "random":
        _logger.warning("Backbone %s has random weights: its features are meaningless.", name)
        return backbone
    if weights == "pretrained":
        state = _pretrained_state(name, size)
    else:
        state = _convert(model, read_state_dict(weights), size, weights)
    load_strict(model, state, what=f"weights {weights!r} into {name}", ignore_unexpected=_classifiers(model))
    return backbone


def _check_name(name: str, weights: str) -> None:
    import timm
    from timm.models import get_deprecated_models, get_pretrained_cfg

    arch = name.partition(".")[0]
    if current := get_deprecated_models().get(arch):
        raise JobError(f"Backbone {name!r}: timm has renamed this model, expected its current name. Use {current!r}.")
    known: Sequence[str] = timm.list_models() + timm.list_models(pretrained=True)
    if arch not in known:
        near = difflib.get_close_matches(name, known, n=5)
        hint = f"Similar names: {', '.join(near)}." if near else "timm.list_models() lists them."
        raise JobError(f"Backbone {name!r}: not a model of timm {timm.__version__}. {hint}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that this architecture does not have
        tags = [other for other in known if other.startswith(arch + ".")]
        raise JobError(
            f"Backbone {name!r}: got an unknown tag of {arch}, expected {listed(tags) or 'none'}. Use one of "
            f"these, or {arch!r} alone."
        ) from error
    if weights == "pretrained" and not (cfg and cfg.has_weights):
        raise JobError(
            f"Backbone {name!r}: timm publishes no pretrained weights for this model. Pass a checkpoint "
            "(--weights FILE), or use another model."
        )


def _create(name: str, size: tuple[int, int], *, pretrained: bool = False) -> nn.Module:
    """Create the timm model, without a classifier unless its pretrained weights are requested."""
    import timm
    from timm.models import get_pretrained_cfg, model_entrypoint

    head: dict[str, Any] = {} if pretrained else {"num_classes": 0}
    cfg = get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size and model_entrypoint(name).__module__ != SAM

    def create(**geometry: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
            torch.manual_seed(_RANDOM_SEED)
            return timm.create_model(name, pretrained=pretrained, **head, **geometry)

    if not fixed:
        return create()
    try:  # keeps the checkpoint's shapes and adapts to the input in each forward pass
        return create(dynamic_img_size=True)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    return create(img_size=size)  # has this size's shapes, to which timm's checkpoint filter resamples


def _check_patches(name: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Reject a size that is not a multiple of the patch: timm silently crops it in models built for the size."""
    if not vars(model)["pretrained_cfg"].get("fixed_input_size"):
        return  # ConvNets; where they have "patches", these overlap
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = (patch, patch) if isinstance(patch, int) else patch
    axes = zip(("height", "width"), size, patch, strict=True)
    wrong = [f"{axis} {length} use {_multiples(length, step)}" for axis, length, step in axes if length % step]
    if wrong:
        raise JobError(
            f"Backbone {name!r}: got images of {size[0]}×{size[1]} pixels, expected multiples of its patch "
            f"({patch[0]}×{patch[1]}). For {', for '.join(wrong)}."
        )


def _multiples(length: int, step: int) -> str:
    below = length // step * step
    return f"{below} or {below + step}" if below else str(step)


def _check_even(name: str, grid: Sequence[int], size: tuple[int, int], stride: int) -> None:
    if tuple(grid) != (even := tuple(-(-length // stride) for length in size)):
        raise JobError(
            f"Backbone {name!r}: got a grid of {grid[0]}×{grid[1]} features from {size[0]}×{size[1]} pixels, expected "
            f"{even[0]}×{even[1]} at its stride of {stride}: the grid does not cover the image evenly, so features "
            "cannot be aligned with it. Use multiples of the stride, or another model."
        )


def _refused_size(name: str, size: tuple[int, int], error: Exception) -> JobError:
    return JobError(
        f"Backbone {name!r}: got images of {size[0]}×{size[1]} pixels, on which it does not run "
        f"({type(error).__name__}: {error}), expected a size that it accepts. Its pretrained size works, and often any "
        "multiple of 32."
    )


def _pretrained_state(name: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """Load timm's own weights, with the classifier: without it, timm does not load strictly."""
    try:
        with _quiet_resampling():
            return _create(name, size, pretrained=True).state_dict()
    except Exception as error:  # network, hub, cache and disk: each library raises its own types
        raise JobError(
            f"Backbone {name!r}: cannot download its pretrained weights ({type(error).__name__}: {error}). Check the "
            "network, and that the cache folder is writable (HF_HOME and TORCH_HOME set another); or download them "
            "elsewhere and pass the file (--weights FILE)."
        ) from error


def _convert(model: nn.Module, state: dict[str, Tensor], size: tuple[int, int], uri: str) -> dict[str, Tensor]:
    """Rename and resample a file's weights as timm does for weights that it downloads."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    got, wanted = state.get("pos_embed"), getattr(model, "pos_embed", None)
    resize: Any = getattr(model, "set_input_size", None)
    try:
        if got is not None and wanted is not None and got.shape != wanted.shape and resize is not None:
            # The file's grid is not timm's: resample once, directly to the grid in use, not via timm's.
            resize(img_size=size)
        with _quiet_resampling():
            return dict(convert(state, model))
    except Exception as error:  # it indexes and reshapes tensors without checks
        raise JobError(
            f"Weights {uri!r}: timm's converter for {type(model).__name__} rejects them ({type(error).__name__}: "
            f"{error}), expected this model's weights. Check that the file was made for this model."
        ) from error


@contextlib.contextmanager
def _quiet_resampling() -> Iterator[None]:
    with warnings.catch_warnings():
        # timm's code that resizes relative position tables (BEiT) makes torch warn about a copy, and about a list used
        # as an index. torch still reads it as a tuple, as intended: see tests/pipeline/features/test_backbone.py.
        warnings.filterwarnings("ignore", message=r"torch\.searchsorted\(\): input value tensor is non-contiguous")
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence for multidimensional indexing")
        yield


def _classifiers(model: nn.Module) -> list[str]:
    """Names of the classifier in checkpoints: its outermost modules that are absent from this headless model."""
    named = vars(model)["pretrained_cfg"].get("classifier") or ()
    names = [named] if isinstance(named, str) else list(named)
    roots = {key.partition(".")[0] for key in model.state_dict()}
    return [name if name.partition(".")[0] in roots else name.partition(".")[0] for name in names]
