"""timm's models by name: which there are, and weights from its hub or from a file in the names of the model."""

import contextlib
import difflib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import JobError
from pipeline.features.layers import SAM
from pipeline.reporting.units import listed

__all__ = ["check_name", "classifiers", "converted", "create_model", "pretrained_state"]

_RANDOM_SEED = 0


def check_name(name: str, weights: str) -> None:
    """Check that timm has a model of this name, and pretrained weights for it if ``weights`` is ``"pretrained"``.

    Raises:
        JobError: it has not; the message has similar names, or the tags that there are.
    """
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


def create_model(name: str, size: tuple[int, int], *, pretrained: bool = False, head: bool = False) -> nn.Module:
    """Create the timm model, without its classifier or projection unless requested.

    Args:
        name: as `check_name` accepts it.
        size: (H, W) of the images in pixels.
        pretrained: with weights from timm's hub, which are for the whole model: with the head.
        head: with the head.

    Raises:
        AssertionError, RuntimeError, ValueError: the model does not accept the size.
    """
    import timm
    from timm.models import get_pretrained_cfg, model_entrypoint

    classes: dict[str, Any] = {} if pretrained or head else {"num_classes": 0}
    cfg = get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size and model_entrypoint(name).__module__ != SAM

    def create(**geometry: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
            torch.manual_seed(_RANDOM_SEED)
            return timm.create_model(name, pretrained=pretrained, **classes, **geometry)

    if not fixed:
        return create()
    try:  # keeps the checkpoint's shapes and adapts to the input in each forward pass
        return create(dynamic_img_size=True)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    return create(img_size=size)  # has this size's shapes, to which timm's checkpoint filter resamples


def pretrained_state(name: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """Load timm's own weights, with the classifier: without it, timm does not load strictly.

    Raises:
        JobError: they can neither be downloaded nor found in the cache.
    """
    try:
        with _quiet_resampling():
            return create_model(name, size, pretrained=True).state_dict()
    except Exception as error:  # network, hub, cache and disk: each library raises its own types
        raise JobError(
            f"Backbone {name!r}: cannot download its pretrained weights ({type(error).__name__}: {error}). Check the "
            "network, and that the cache folder is writable (HF_HOME and TORCH_HOME set another); or download them "
            "elsewhere and pass the file (--weights FILE)."
        ) from error


def converted(model: nn.Module, state: dict[str, Tensor], size: tuple[int, int], uri: str) -> dict[str, Tensor]:
    """Rename and resample a file's weights as timm does for weights that it downloads.

    Raises:
        JobError: timm's converter rejects them.
    """
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


def classifiers(model: nn.Module) -> list[str]:
    """Names of the classifier in checkpoints: its outermost modules that are absent from this headless model."""
    named = vars(model)["pretrained_cfg"].get("classifier") or ()
    names = [named] if isinstance(named, str) else list(named)
    roots = {key.partition(".")[0] for key in model.state_dict()}
    return [name if name.partition(".")[0] in roots else name.partition(".")[0] for name in names]
