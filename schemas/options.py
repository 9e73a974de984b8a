"""Options of the jobs. Every field is a command-line option; the comment above it is its help text."""

import re
from dataclasses import dataclass
from typing import Literal

from schemas.checks import (
    at_least,
    check_components,
    check_error_floor,
    check_shard_images,
    parse_layers,
    parse_size,
    parse_workers,
)
from schemas.configuration import MAX_PIXELS, MIN_SIDE, Facet, Fit, Quality, Represent, Space
from schemas.upsamplers import UpsamplerOptions

# At k = 128 and 224 px, int8 shards of 64 images are about 410 MB before compression, float16 shards of 8 about 100 MB:
# large enough for object storage, small enough to recompute.
SHARD_IMAGES = {"int8": 64, "float16": 8}
COMPACT_SHARD_IMAGES = 256  # about 25 kB each
MOST_SHARD_BYTES = 512 << 20  # before compression: a worker holds several shards
DEFAULT_COMPONENTS = 64
LEAST_FIT_IMAGES = 4
ERROR_FLOOR = 0.1  # of int8, as a share of the features' root mean square


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Options of jobs that run one backbone on a dataset: the images, and their low-resolution features."""

    # Images: a folder, a list (.txt, .csv, .tsv), WebDataset tars, Parquet files, or a pattern (*.tar, {000..099});
    # local, s3://, gs:// or http(s)://. The plan lists unused files by reason.
    images: str
    # Parquet, CSV: column with image bytes, URIs or base64. Tars: file extension, such as "left.png". Detected if
    # omitted.
    image_column: str | None = None
    # Use only the first N images.
    limit: int | None = None
    # Backbone: any timm model, as "architecture" or "architecture.tag".
    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    # Weights of the backbone: "pretrained" (downloaded by timm), "random" (for tests), or a .safetensors/.pth file or
    # URI.
    weights: str = "pretrained"
    # ViT block or ConvNet stage whose output is used; negative numbers count from the end. Several, "8,9,10,11", are
    # concatenated on the finest one's grid. If omitted, a ViT's last block, a ConvNet's last stage and the one before.
    layer: str | None = None
    # Space of the features: "layer", the layer's own; or "head": the last layer through the model's head at every
    # position: class scores of a classifier, or the space of the text embeddings of CLIP and SigLIP.
    space: Space = "layer"
    # Facet of a ViT's last block: "token", its output; or "value", the values of its attention. MaskCLIP's features are
    # those of CLIP with --facet value --space head.
    facet: Facet = "token"
    # Input size of the backbone in pixels: "224" or "HEIGHTxWIDTH".
    size: str = "224"
    # How to fit images of another shape: centre crop, pad at the right or bottom, or squash.
    fit: Fit = "crop"
    # Images per forward pass of the backbone; if omitted, 32 on a GPU, 4 on a CPU, where
    # several batches run at once.
    batch_size: int | None = None
    # Device: "auto", "cpu" or "cuda".
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Number of Ray workers, "8", or "MIN:MAX": MIN are kept, more are requested from the cluster while shards wait for
    # one, and released when none does. 0 runs in this process, without Ray. If omitted, a small job (1,000 images) on
    # one machine without a cluster, and with at most one GPU, runs in this process; any other job has one worker per
    # GPU of the cluster, or one per node with CPUs, also of nodes that join later.
    workers: int | str | None = None
    # Share of a GPU that each worker takes: 0.5 places two workers on a GPU, for small backbones that do not fill one.
    gpu_share: float = 1.0
    # On a Ray cluster: while a GPU waits for the cores of its own node, also decode images on nodes without a GPU.
    decode_elsewhere: bool = True
    # Reject images with more pixels than this without decoding them (decompression bombs).
    max_pixels: int = MAX_PIXELS
    # Reject images whose shorter side has fewer pixels than this.
    min_side: int = MIN_SIDE

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        at_least("--limit", self.limit, 1)
        at_least("--batch-size", self.batch_size, 1)
        parse_workers("--workers", self.workers)
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"--gpu-share is a share of one GPU, above 0 and at most 1: got {self.gpu_share:g}")
        at_least("--min-side", self.min_side, 1)
        at_least("--max-pixels", self.max_pixels, self.min_side**2)
        parse_size("--size", self.size)
        parse_layers("--layer", self.layer)

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Smallest and largest number of workers; None: as many as the cluster has devices or nodes."""
        return parse_workers("--workers", self.workers)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers as numbers; None: the default of the backbone's family."""
        return parse_layers("--layer", self.layer)

    @property
    def size_px(self) -> tuple[int, int]:
        """Input (height, width)."""
        return parse_size("--size", self.size)

    @property
    def output_size_px(self) -> tuple[int, int]:
        """(height, width) that the geometry (affine maps, valid boxes) refers to; here the input size."""
        return self.size_px


@dataclass(frozen=True, kw_only=True)
class PcaConfig(FeatureConfig):
    """Options of jobs that project features on a PCA basis."""

    # PCA components to keep: a number, or a share of the variance, such as 0.95, for as many as explain it. If omitted,
    # 64, or all channels if the backbone has fewer.
    components: int | float | None = None
    # Images to fit the PCA basis on, spread evenly over the dataset; 0 means all.
    pca_images: int = 2000

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        FeatureConfig.__post_init__(self)
        check_components("--components", self.components)
        at_least("--pca-images", self.pca_images, 0)


@dataclass(frozen=True, kw_only=True)
class UpsampleConfig(UpsamplerOptions, PcaConfig):
    """Compute features of images and write a feature store."""

    # Feature store to write: a folder, s3://bucket/prefix or gs://bucket/prefix.
    store: str
    # Resolution of the stored features in pixels, "224" or "HEIGHTxWIDTH"; if omitted, --size.
    output_size: str | None = None
    # PCA basis: a .npz file from jobs/fit_pca.py or the URI of another store; if omitted, fitted on these images.
    pca: str | None = None
    # Another store, to merge with this one later (jobs/merge_stores.py): its PCA basis, its quantization steps and its
    # upsampler's fit are taken, and not fitted on these images. All options that features depend on must be equal; of
    # them, --layer, --components, --quality, --represent, --error-floor, --embedding, --shard-images, --views and
    # --jbu-kernels are those of that store if they are omitted. Replaces --pca.
    like: str | None = None
    # Quality of the stored features: "high", within .9995 of cosine similarity; "balanced", stored at half the
    # resolution: .9994, at 0.4 of the bytes; "small": .995, at 0.2. It chooses --represent and --error-floor.
    quality: Quality = "high"
    # Representation of the features in the store: "dense"; "half": at half the resolution, interpolated by readers; or
    # "compact": components before the last step of upsampling, and a small image that guides it. With
    # jbu, a compact store takes a twentieth to a fortieth of the bytes; readers, which need torch, take the step. For
    # bilinear, jbu without weights, and multiview. If omitted, --quality decides, or the store that is resumed.
    represent: Represent | None = None
    # Also store one vector per image, from the same pass: the pooled features that the model's classifier would take
    # (its class token or average), or with --space head its output, such as CLIP's embedding of the image.
    embedding: bool = False
    # Data type of the stored features.
    dtype: Literal["int8", "float16"] = "int8"
    # int8 only: error floor common to all components, in units of their root mean square. Larger values give smaller,
    # coarser stores. If omitted, --quality decides, or the store that is resumed.
    error_floor: float | None = None
    # Images per shard; if omitted, 64 for int8, 8 for float16, 256 for compact stores, or fewer if a shard would exceed
    # 512 MiB before compression.
    shard_images: int | None = None
    # Compute only shards a up to (not including) b, given as "a:b", to split one store over several jobs.
    shards: str | None = None
    # Resume an existing store.
    resume: bool = False
    # Append images to an existing store: those whose keys it does not have become new rows at its end.
    append: bool = False
    # Replace an existing store.
    overwrite: bool = False
    # Print the plan and exit.
    dry_run: bool = False
    # With --dry-run: compute a few images in this process, and print the bytes and the time that the job will take.
    measure: bool = False
    # Exit with code 1 if more than this share of the images failed; with code 2, before any work, if the listing
    # already shows that more will fail (unsupported formats such as .heic, broken links).
    max_failed_share: float = 0.01
    # Failures after which this run gives up on a shard; losing a node does not count. A shard that keeps failing is
    # searched for the images that make it fail: they become failed rows. --resume retries it.
    attempts: int = 3
    # How long the job waits for a storage that answers nobody, before shards that need it fail.
    outage_patience_s: float = 3600.0
    # Replace a worker after this many seconds without progress.
    stall_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        PcaConfig.__post_init__(self)
        UpsamplerOptions.__post_init__(self)
        check_shard_images(self.shard_images)
        at_least("--attempts", self.attempts, 1)
        check_error_floor(self.error_floor, self.dtype)
        if self.dtype == "float16" and self.quality != "high":
            raise ValueError(f"--quality {self.quality} is for int8: got --dtype float16, expected one of the two")
        at_least("--stall-timeout-s", self.stall_timeout_s, 1)
        at_least("--outage-patience-s", self.outage_patience_s, 0)
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"--max-failed-share is a share: got {self.max_failed_share}, expected 0 … 1")
        if self.like is not None and self.pca is not None:
            raise ValueError(
                f"--like takes the basis of a store too: got --like {self.like} and --pca {self.pca}, omit --pca"
            )
        if self.measure and not self.dry_run:
            raise ValueError("--measure computes a few images for a plan: pass --dry-run too, or omit it")
        if self.resume + self.append + self.overwrite > 1:
            raise ValueError(
                "--resume continues the store, --append adds images to it, --overwrite replaces it: pass only one"
            )
        if self.append and self.shards is not None:
            raise ValueError(f"--append makes all new shards: got --shards {self.shards}, omit it")
        if self.output_size is not None:
            parse_size("--output-size", self.output_size)
        self.shard_range(1)

    @property
    def continues(self) -> bool:
        """Whether the job works on the store that is there: with ``resume`` or ``append``."""
        return self.resume or self.append

    @property
    def output_size_px(self) -> tuple[int, int]:
        """(height, width) of the stored features."""
        return self.size_px if self.output_size is None else parse_size("--output-size", self.output_size)

    @property
    def representation(self) -> Represent:
        """What the store holds."""
        return self.represent or ("dense" if self.quality == "high" else "half")

    @property
    def floor(self) -> float:
        """The error floor of int8."""
        if self.error_floor is not None:
            return self.error_floor
        return 0.35 if self.quality == "small" else ERROR_FLOOR

    def shard_rows(self, image_nbytes: int) -> int:
        """Images per shard of a new store, given the bytes of an image's features before compression."""
        most = COMPACT_SHARD_IMAGES if self.representation == "compact" else SHARD_IMAGES[self.dtype]
        return self.shard_images or max(1, min(most, MOST_SHARD_BYTES // image_nbytes))

    def shard_range(self, shards: int) -> range:
        """The shards that this job computes, out of ``shards`` in total."""
        if self.shards is None:
            return range(shards)
        match = re.fullmatch(r"(\d*):(\d*)", self.shards)
        if not match:
            raise ValueError(f'--shards is a range "a:b", "a:" or ":b": got {self.shards!r}')
        first, end = int(match[1] or 0), int(match[2]) if match[2] else None
        if end is not None and end <= first:
            raise ValueError(f"--shards {self.shards} is empty: the end must be greater than the start")
        return range(first, shards)[: None if end is None else end - first]


@dataclass(frozen=True, kw_only=True)
class FitPcaConfig(PcaConfig):
    """Fit a PCA basis on images and write it to a file."""

    # Output: the .npz file or URI to write.
    output: str

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        super().__post_init__()
        if not self.output.endswith(".npz"):
            raise ValueError(f"--output is a NumPy file: got {self.output!r}, expected a name that ends in .npz")


@dataclass(frozen=True, kw_only=True)
class FitPoolingConfig(FeatureConfig):
    """Fit weights for --upsampler multiview on images and write them to a file, to use in several jobs."""

    # Output: the .safetensors file or URI to write.
    output: str
    # Images to fit on, spread evenly over the dataset; settings are chosen on a quarter of them.
    fit_images: int = 24
    # PCA components in which the settings are chosen; fewer if the backbone has fewer channels.
    components: int = 64
    # Views per image. More views are better but slower, because the backbone runs on each.
    views: int = 9
    # Further views per image, on which settings are evaluated.
    held_out_views: int = 12
    # Image pixels per side of a cell of the solver's grid; joint bilateral upsampling does the rest. 2 takes four times
    # as long and is not better.
    solver_stride: int = 4

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        super().__post_init__()
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"--output: got {self.output!r}, expected a name that ends in .safetensors")
        at_least("--fit-images", self.fit_images, LEAST_FIT_IMAGES)
        at_least("--components", self.components, 1)
        at_least("--views", self.views, 2)
        at_least("--held-out-views", self.held_out_views, 1)
        at_least("--solver-stride", self.solver_stride, 1)
        if self.workers not in (None, 0):
            raise ValueError(f"--workers {self.workers}: this job runs in one process, omit the option")
