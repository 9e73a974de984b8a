"""Options of jobs/train_upsampler.py. Comments are the help texts, as in schemas/options.py."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from schemas.checks import at_least, check_method_options, check_seed, parse_layers, parse_size, positive
from schemas.configuration import MAX_PIXELS, MIN_SIDE, Fit

# FeatUp publishes 4 images per step. LiFT publishes 64 to 256; 16 suit a CPU or a small GPU.
_BATCH_SIZE = {"jbu": 4, "lift": 16}
# FeatUp's published rate. LiFT's, 1e-3, is too high for weights that start close to a solution.
_LEARNING_RATE = {"jbu": 1e-3, "lift": 3e-4}
_VAL_SHARE = 0.1
# Outside of this range, kernels are a point or flat in float32, and nothing is learned.
_LEAST_SIGMA, _MOST_SIGMA = 0.01, 100.0
# Options of jbu that only one --target has.
OF_TARGET = {
    "views": ("jitters", "crf_weight", "initial_sigma", "downsampler", "final"),
    "multiview": ("cache_gb",),
}
_CHOICE = re.compile(r"(?P<name>[^@=\s]+)(?:@(?P<layer>-?\d+(?:,-?\d+)*))?(?:=(?P<weights>.+))?")


@dataclass(frozen=True)
class BackboneChoice:
    """A backbone as given on the command line: ``NAME[@LAYER][=WEIGHTS]``.

    Attributes:
        name: name of a timm model.
        layers: as ``--layer`` of the main job; None: the default of the backbone's family.
        weights: as ``--weights`` of the main job.
    """

    name: str
    layers: tuple[int, ...] | None = None
    weights: str = "pretrained"

    @classmethod
    def parse(cls, option: str, text: str) -> "BackboneChoice":
        """Parse ``"vit_small_patch14_dinov2.lvd142m@10=vit.safetensors"``; layer and weights are optional.

        Raises:
            ValueError: the text does not have that form.
        """
        match = _CHOICE.fullmatch(text)
        if not match:
            raise ValueError(f"{option} is NAME, NAME@LAYER, NAME=WEIGHTS or NAME@LAYER=WEIGHTS: got {text!r}")
        return cls(match["name"], parse_layers(option, match["layer"]), match["weights"] or "pretrained")


_LEAST: dict[str, float] = {
    "limit": 1, "val_count": 1, "val_views": 1, "steps": 1, "batch_size": 1, "max_pad_px": 0,
    "max_zoom": 1, "workers": 1, "checkpoint_every": 1, "evaluate_every": 1, "attempts": 0, "min_side": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SharedTrainOptions:
    """Options shared by all upsamplers."""

    # Images to train on: a folder, WebDataset tars or Parquet files; local, s3://, gs:// or http(s)://.
    images: str
    # Output folder or URI for the weights (upsampler.safetensors), losses, curves and checkpoints.
    output: str
    # Upsampler to train: "jbu" (FeatUp's multi-view consistency) or "lift" (LiFT's octaves).
    upsampler: Literal["jbu", "lift"] = "jbu"
    # Backbones to train on, each NAME[@LAYER][=WEIGHTS], with the values of --backbone, --layer and --weights of the
    # main job. Several backbones take turns, one step each.
    backbones: tuple[str, ...] = ("vit_small_patch14_dinov2.lvd142m",)
    # A backbone that is only measured on, not trained on: NAME[@LAYER][=WEIGHTS].
    held_out_backbone: str | None = None
    # Size in pixels of the images that the upsampler will be used on: "224" or "HEIGHTxWIDTH".
    size: str = "224"
    # How to fit images of another shape: centre crop, pad at the right or bottom, or squash.
    fit: Fit = "crop"
    # Parquet, CSV: column with image bytes, URIs or base64. Tars: file extension. Detected if omitted. Also that of
    # --val-images.
    image_column: str | None = None
    # Use only the first N images.
    limit: int | None = None
    # Images for measurements on held-out views; if omitted, a share of --images, chosen by a hash of their keys.
    val_images: str | None = None
    # Without --val-images: share of --images reserved for measurements; if omitted, 0.1.
    val_share: float | None = None
    # Number of images for measurements on held-out views.
    val_count: int = 32
    # Held-out views per image.
    val_views: int = 4
    # Number of training steps.
    steps: int = 2000
    # Images per step and worker; if omitted, 4 for jbu, 16 for lift.
    batch_size: int | None = None
    # Learning rate of NAdam (jbu) or Adam (lift); if omitted, 1e-3 for jbu, 3e-4 for lift.
    learning_rate: float | None = None
    # Padding around an image, in pixels, that a view may include, in training (jbu --target views) and held out.
    max_pad_px: int = 20
    # Largest enlargement factor of a view, in training (jbu --target views) and held out.
    max_zoom: float = 2.0
    # Seed of all random numbers. Together with the step and the worker it determines the order of images and the views.
    seed: int = 0
    # Number of training processes, started by Ray, each on a GPU or on its share of the CPUs. 1 trains in this process,
    # without Ray.
    workers: int = 1
    # Device: "auto", "cpu" or "cuda". On a GPU, backbones and lift compute in bfloat16; weights, losses and jbu are
    # float32.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Steps between checkpoints. The newest two are kept.
    checkpoint_every: int = 100
    # Steps between measurements on held-out views.
    evaluate_every: int = 250
    # Resume from the newest checkpoint in --output, or start from scratch if there is none.
    resume: bool = False
    # With several workers: maximum number of restarts after a worker died.
    attempts: int = 3
    # Print the plan and exit.
    dry_run: bool = False
    # Reject images with more pixels than this without decoding them (decompression bombs).
    max_pixels: int = MAX_PIXELS
    # Reject images whose shorter side has fewer pixels than this.
    min_side: int = MIN_SIDE

    def __post_init__(self) -> None:
        """Check the ranges."""
        for option, least in _LEAST.items():
            at_least(f"--{option.replace('_', '-')}", getattr(self, option), least)
        parse_size("--size", self.size)
        check_seed(self.seed)
        self._check_val_share()
        positive("--learning-rate", self.effective_learning_rate)
        at_least("--max-pixels", self.max_pixels, self.min_side**2)
        if self.max_zoom > min(self.size_px):
            raise ValueError(
                f"--max-zoom {self.max_zoom} leaves less than a pixel of an image of --size {self.size}: use at most "
                f"{min(self.size_px)}"
            )
        if self.max_pad_px >= min(self.size_px):
            raise ValueError(
                f"--max-pad-px {self.max_pad_px} is too large to reflect an image of --size {self.size}: use at most "
                f"{min(self.size_px) - 1}"
            )

    def _check_val_share(self) -> None:
        if self.val_share is None:
            return
        if not 0 < self.val_share < 1:
            raise ValueError(f"--val-share is a share: got {self.val_share}, expected between 0 and 1")
        if self.val_images is not None:
            raise ValueError(
                f"--val-share {self.val_share} reserves a share of --images, but --val-images {self.val_images} are "
                "measured on: omit one of the two"
            )

    @property
    def held_out_share(self) -> float:
        """Share of --images that is reserved for measurements: 0 with --val-images."""
        if self.val_images is not None:
            return 0
        return _VAL_SHARE if self.val_share is None else self.val_share

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the images that the upsampler will be used on."""
        return parse_size("--size", self.size)

    @property
    def backbone_choices(self) -> tuple[BackboneChoice, ...]:
        """The backbones to train on."""
        return tuple(BackboneChoice.parse("--backbones", text) for text in self.backbones)

    @property
    def held_out_choice(self) -> BackboneChoice | None:
        """The backbone that is only measured on."""
        if self.held_out_backbone is None:
            return None
        return BackboneChoice.parse("--held-out-backbone", self.held_out_backbone)

    @property
    def batch_images(self) -> int:
        """Images per step and worker."""
        return self.batch_size or _BATCH_SIZE[self.upsampler]

    @property
    def effective_learning_rate(self) -> float:
        """--learning-rate, or the upsampler's default."""
        return _LEARNING_RATE[self.upsampler] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, kw_only=True)
class _CacheOptions:
    """Options of trainings whose targets are the same in every epoch."""

    # lift, jbu --target multiview: gigabytes of main memory per worker for keeping features or solutions, which are the
    # same in every epoch. Used only if those of all images fit.
    cache_gb: float = 8.0

    def __post_init__(self) -> None:
        """Check the range."""
        at_least("--cache-gb", self.cache_gb, 0)


@dataclass(frozen=True, kw_only=True)
class JBUTrainOptions(_CacheOptions):
    """Options for training ``jbu``."""

    # jbu: also train FeatUp's final C→C convolution. The weights then work only with this backbone and layer; without
    # it, they depend on the image alone and work with every backbone.
    final: bool = False
    # jbu: what the upsampled features are trained to be: "views", consistent with the backbone's features of random
    # views, as FeatUp; or "multiview", the features that --upsampler multiview solves for.
    target: Literal["views", "multiview"] = "views"
    # jbu: views per image and step.
    jitters: int = 5
    # jbu: number of random directions of feature space that a step compares, at most all.
    projection_chs: int = 30
    # jbu: weight of the CRF term, which makes features of nearby pixels with similar colours similar.
    crf_weight: float = 1e-3
    # jbu: initial standard deviation of the spatial kernels, in kernel radii. FeatUp starts with 1, which blurs; 0.25
    # learns faster.
    initial_sigma: float = 0.25
    # jbu: how training downsamples high-res features to the backbone's grid.
    downsampler: Literal["attention", "simple"] = "attention"
    # jbu: also write the weights in FeatUp's layout to this .pth or .ckpt file or URI; requires a single backbone.
    featup_checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        at_least("--jitters", self.jitters, 1)
        at_least("--projection-chs", self.projection_chs, 1)
        at_least("--crf-weight", self.crf_weight, 0)
        if not _LEAST_SIGMA <= self.initial_sigma <= _MOST_SIGMA:
            raise ValueError(
                f"--initial-sigma must be {_LEAST_SIGMA} … {_MOST_SIGMA:.0f} kernel radii: got {self.initial_sigma}"
            )
        if self.featup_checkpoint is not None and not self.featup_checkpoint.endswith((".pth", ".ckpt")):
            raise ValueError(f"--featup-checkpoint is a .pth or .ckpt file: got {self.featup_checkpoint!r}")


@dataclass(frozen=True, kw_only=True)
class LiFTTrainOptions(_CacheOptions):
    """Options for training ``lift``."""

    # lift: initial weights, bilinear interpolation or random (as published).
    lift_initial: Literal["interpolation", "random"] = "interpolation"
    # lift: loss, squared error or cosine distance (as published).
    lift_loss: Literal["squared", "cosine"] = "squared"
    # lift: number of octaves to train on: --size, half of it, and so on. Published: 2.
    lift_octaves: int = 1
    # lift: weight of the consistency term, which makes upsampled features, averaged over each cell, equal their input.
    # Published: 0.
    lift_consistency: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        at_least("--lift-octaves", self.lift_octaves, 1)
        at_least("--lift-consistency", self.lift_consistency, 0)


# Options of each upsampler that can be trained, by its name.
TRAIN_OPTIONS: dict[str, type] = {"jbu": JBUTrainOptions, "lift": LiFTTrainOptions}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JBUTrainOptions, LiFTTrainOptions, SharedTrainOptions):
    """Train an upsampler on images and write its weights."""

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        SharedTrainOptions.__post_init__(self)
        check_method_options(self, self.upsampler, TRAIN_OPTIONS)
        self._check_target()
        self._check_octaves()
        self._check_backbones()

    def _check_target(self) -> None:
        if self.upsampler != "jbu":
            return
        defaults = {field.name: field.default for field in fields(self)}
        for target, options in OF_TARGET.items():
            given = [option for option in options if getattr(self, option) != defaults[option]]
            if given and target != self.target:
                option, value = given[0].replace("_", "-"), getattr(self, given[0])
                raise ValueError(f"--{option} {value} is for --target {target}: got {self.target}")

    def _check_octaves(self) -> None:
        smallest = 2 ** (self.lift_octaves - 1)
        if self.upsampler == "lift" and any(side % smallest for side in self.size_px):
            raise ValueError(
                f"--size {self.size}: lift trains on {self.lift_octaves} octaves, expected multiples of {smallest}"
            )

    def _check_backbones(self) -> None:
        if not self.backbones:
            raise ValueError("--backbones: got none, expected at least one")
        labels = [(choice.name, choice.layers) for choice in self.backbone_choices]
        if len(set(labels)) < len(labels):
            raise ValueError(f"--backbones {' '.join(self.backbones)} names a backbone and layer twice")
        alone = "lift mixes channels" if self.upsampler == "lift" else "--final mixes channels" if self.final else ""
        for option, several in (
            ("several --backbones", len(self.backbones) > 1),
            ("--held-out-backbone", self.held_out_backbone is not None),
        ):
            if alone and several:
                raise ValueError(f"{option}: {alone}, so its weights serve one backbone: pass one, or jbu --no-final")
        if self.featup_checkpoint is not None and len(self.backbones) > 1:
            raise ValueError(
                "--featup-checkpoint: FeatUp's layout is for a single backbone's number of channels; got "
                f"{len(self.backbones)} --backbones"
            )
