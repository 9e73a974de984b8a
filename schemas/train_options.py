"""The options of jobs/train_upsampler.py. Comments are the help texts, as in schemas/options.py."""

import re
from dataclasses import dataclass
from typing import Literal

from schemas.checks import at_least, check_method_options, parse_size, positive
from schemas.configuration import MAX_PIXELS, MIN_SIDE, Fit

# As published: FeatUp takes 4 images a step, LiFT 64 to 256, of which a CPU or a small GPU takes 16.
_BATCH_SIZE = {"jbu": 4, "lift": 16}
# As published; for lift 1e-3, which is too much for weights that begin where they are nearly right.
_LEARNING_RATE = {"jbu": 1e-3, "lift": 3e-4}
_CHOICE = re.compile(r"(?P<name>[^@=\s]+)(?:@(?P<layer>-?\d+))?(?:=(?P<weights>.+))?")


@dataclass(frozen=True)
class BackboneChoice:
    """A backbone as the command line names it: ``NAME[@LAYER][=WEIGHTS]``.

    Attributes:
        name: timm model.
        layer: as ``--layer`` of the main job.
        weights: as ``--weights`` of the main job.
    """

    name: str
    layer: int = -1
    weights: str = "pretrained"

    @classmethod
    def parse(cls, option: str, text: str) -> "BackboneChoice":
        """``"vit_small_patch14_dinov2.lvd142m@10=vit.safetensors"`` and parts of it.

        Raises:
            ValueError: not of that form.
        """
        match = _CHOICE.fullmatch(text)
        if not match:
            raise ValueError(f"{option} is NAME, NAME@LAYER, NAME=WEIGHTS or NAME@LAYER=WEIGHTS: got {text!r}")
        return cls(match["name"], int(match["layer"] or -1), match["weights"] or "pretrained")


_LEAST: dict[str, float] = {
    "limit": 1, "val_count": 1, "val_views": 1, "steps": 1, "batch_size": 1, "max_pad_px": 0,
    "max_zoom": 1, "seed": 0, "workers": 1, "checkpoint_every": 1, "evaluate_every": 1, "attempts": 0, "min_side": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SharedTrainOptions:
    """The options of every training."""

    # Images to train on: folder, WebDataset tars or Parquet; local, s3://, gs:// or http(s)://.
    images: str
    # Folder or URI for the weights (upsampler.safetensors), losses, curves and checkpoints.
    output: str
    # What to train: "jbu" (FeatUp's multi-view consistency) or "lift" (LiFT's octaves).
    upsampler: Literal["jbu", "lift"] = "jbu"
    # Backbones to train on, each NAME[@LAYER][=WEIGHTS] as --backbone, --layer and --weights of the main job; several
    # take turns, a step each.
    backbones: tuple[str, ...] = ("vit_small_patch14_dinov2.lvd142m",)
    # A backbone that is not trained on, to measure on: NAME[@LAYER][=WEIGHTS].
    held_out_backbone: str | None = None
    # Pixels of the images that the upsampler will be used on: "224", or "HEIGHTxWIDTH".
    size: str = "224"
    # How an image of another shape gets there: centre crop, pad at the right or bottom, or squash.
    fit: Fit = "crop"
    # Parquet: the column with image bytes, URIs or base64; tars: the extension. Detected if omitted.
    image_column: str | None = None
    # Only the first N images.
    limit: int | None = None
    # Images to measure held-out views on; if omitted, a share of --images, chosen by a hash of their keys.
    val_images: str | None = None
    # Without --val-images: the share of the images that is kept out of training.
    val_share: float = 0.1
    # Images to measure held-out views on.
    val_count: int = 32
    # Views of each of them.
    val_views: int = 4
    # Steps to train.
    steps: int = 2000
    # Images in a step on each worker; if omitted, 4 for jbu, 16 for lift.
    batch_size: int | None = None
    # Learning rate of NAdam (jbu) or Adam (lift); if omitted, 1e-3 for jbu, 3e-4 for lift.
    learning_rate: float | None = None
    # Pixels of padding around an image that a view may show; also of held-out views.
    max_pad_px: int = 20
    # Largest enlargement of a view; also of held-out views.
    max_zoom: float = 2.0
    # Seed of all random numbers; it, the step and the worker determine the order of the images and their views.
    seed: int = 0
    # Processes that train together, started with Ray, each on a GPU or on its share of the CPUs; 1: this one, no Ray.
    workers: int = 1
    # "auto", "cpu" or "cuda"; on a GPU backbones and lift compute in bfloat16, weights, losses and jbu in float32.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Steps between checkpoints; the newest two are kept.
    checkpoint_every: int = 100
    # Steps between measurements on held-out views.
    evaluate_every: int = 250
    # Resume from the newest checkpoint in --output, or start if there is none.
    resume: bool = False
    # With several workers: restarts after a worker died.
    attempts: int = 3
    # Print the plan and exit.
    dry_run: bool = False
    # Images with more pixels than this are not opened (decompression bombs).
    max_pixels: int = MAX_PIXELS
    # Images with a shorter side are not used.
    min_side: int = MIN_SIDE

    def __post_init__(self) -> None:
        """Check the ranges."""
        for option, least in _LEAST.items():
            at_least(f"--{option.replace('_', '-')}", getattr(self, option), least)
        parse_size("--size", self.size)
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be less than 2^63: got {self.seed}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"--val-share is a share: got {self.val_share}, expected between 0 and 1")
        positive("--learning-rate", self.effective_learning_rate)
        at_least("--max-pixels", self.max_pixels, self.min_side**2)
        if self.max_pad_px >= min(self.size_px):
            raise ValueError(
                f"--max-pad-px {self.max_pad_px} reflects more than an image of --size {self.size} has: take at most "
                f"{min(self.size_px) - 1}"
            )

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the images that the upsampler will be used on."""
        return parse_size("--size", self.size)

    @property
    def backbone_choices(self) -> tuple[BackboneChoice, ...]:
        """The backbones trained on."""
        return tuple(BackboneChoice.parse("--backbones", text) for text in self.backbones)

    @property
    def held_out_choice(self) -> BackboneChoice | None:
        """The backbone that is only measured on."""
        if self.held_out_backbone is None:
            return None
        return BackboneChoice.parse("--held-out-backbone", self.held_out_backbone)

    @property
    def batch_images(self) -> int:
        """Images in a step on each worker."""
        return self.batch_size or _BATCH_SIZE[self.upsampler]

    @property
    def effective_learning_rate(self) -> float:
        """--learning-rate, or the upsampler's default."""
        return _LEARNING_RATE[self.upsampler] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, kw_only=True)
class JBUTrainOptions:
    """Options of training ``jbu``."""

    # Jbu: train FeatUp's final C→C convolution too. The weights then serve this backbone and layer only; without it,
    # they depend on the image alone and serve every backbone.
    final: bool = False
    # Jbu: views of an image in a step.
    jitters: int = 5
    # Jbu: random directions of feature space in which a step compares.
    projection_chs: int = 30
    # Jbu: weight of the term that asks like-coloured neighbours for like features.
    crf_weight: float = 1e-3
    # Jbu: the kernels' deviation to begin with, in kernel radii. FeatUp begins with 1, which blurs: 0.25 learns faster.
    initial_sigma: float = 0.25
    # Jbu: how training takes high-res features back to the grid.
    downsampler: Literal["attention", "simple"] = "attention"
    # Also write FeatUp's own layout here, a .pth or .ckpt file or URI; for one backbone.
    featup_checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least("--jitters", self.jitters, 1)
        at_least("--projection-chs", self.projection_chs, 1)
        at_least("--crf-weight", self.crf_weight, 0)
        positive("--initial-sigma", self.initial_sigma)
        if self.featup_checkpoint is not None and not self.featup_checkpoint.endswith((".pth", ".ckpt")):
            raise ValueError(f"--featup-checkpoint is a .pth or .ckpt file: got {self.featup_checkpoint!r}")


@dataclass(frozen=True, kw_only=True)
class LiFTTrainOptions:
    """Options of training ``lift``."""

    # Lift: begin as bilinear interpolation, or at random as published.
    lift_initial: Literal["interpolation", "random"] = "interpolation"
    # Lift: squared error, or cosine distance as published.
    lift_loss: Literal["squared", "cosine"] = "squared"
    # Lift: octaves to train on, --size and half of it, ...; 2 as published.
    lift_octaves: int = 1
    # Lift: weight of the term that asks for upsampled features which, averaged, are those they were made from; 0 as
    # published.
    lift_consistency: float = 1.0
    # Lift: gigabytes of main memory that a worker may keep features in, which are the same in every epoch; used if
    # those of all images fit.
    cache_gb: float = 8.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least("--lift-octaves", self.lift_octaves, 1)
        at_least("--lift-consistency", self.lift_consistency, 0)
        at_least("--cache-gb", self.cache_gb, 0)


# Options of each upsampler that can be trained, by its name.
TRAIN_OPTIONS: dict[str, type] = {"jbu": JBUTrainOptions, "lift": LiFTTrainOptions}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JBUTrainOptions, LiFTTrainOptions, SharedTrainOptions):
    """Images in, weights of an upsampler out."""

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        SharedTrainOptions.__post_init__(self)
        check_method_options(self, self.upsampler, TRAIN_OPTIONS)
        self._check_octaves()
        self._check_backbones()

    def _check_octaves(self) -> None:
        smallest = 2 ** (self.lift_octaves - 1)
        if self.upsampler == "lift" and any(side % smallest for side in self.size_px):
            raise ValueError(
                f"--size {self.size}: lift trains on {self.lift_octaves} octaves, expected multiples of {smallest}"
            )

    def _check_backbones(self) -> None:
        if not self.backbones:
            raise ValueError("--backbones: got none, expected at least one")
        labels = [(choice.name, choice.layer) for choice in self.backbone_choices]
        if len(set(labels)) < len(labels):
            raise ValueError(f"--backbones: got one twice in {' '.join(self.backbones)}, expected different ones")
        alone = "lift mixes channels" if self.upsampler == "lift" else "--final mixes channels" if self.final else ""
        for option, several in (
            ("several --backbones", len(self.backbones) > 1),
            ("--held-out-backbone", self.held_out_backbone is not None),
        ):
            if alone and several:
                raise ValueError(f"{option}: {alone}, so its weights serve one backbone: give one, or jbu --no-final")
        if self.featup_checkpoint is not None and len(self.backbones) > 1:
            raise ValueError(
                "--featup-checkpoint: FeatUp's layout is of a jbu for one backbone's number of channels; got "
                f"{len(self.backbones)} --backbones"
            )
