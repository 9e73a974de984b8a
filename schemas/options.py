"""The options of the jobs. Every field is an option of the command line; its comment is the help text."""

import re
from dataclasses import dataclass
from typing import Literal

from schemas.checks import at_least, parse_size
from schemas.configuration import MAX_PIXELS, MIN_SIDE, Fit
from schemas.upsamplers import UpsamplerOptions

# At k = 128 and 224 px, int8 shards of 64 images are 411 MB before compression and about 45 MB after it, and float16
# shards of 8 are 103 MB and compress little: large enough for object storage, small enough to redo.
SHARD_IMAGES = {"int8": 64, "float16": 8}
MOST_SHARD_BYTES = 512 << 20  # before compression: a worker holds several shards
DEFAULT_COMPONENTS = 128


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which images, and which low-resolution features of them: what all jobs share."""

    # Folder, list (.txt, .csv, .tsv), WebDataset tars or Parquet, or a pattern (*.tar, {000..099}); local, s3://,
    # gs:// or http(s)://. The plan lists unused files by reason.
    images: str
    # Parquet, CSV: the column with image bytes, URIs or base64; tars: the extension, such as "left.png". Detected if
    # omitted.
    image_column: str | None = None
    # Only the first N images.
    limit: int | None = None
    # Any timm model, as "architecture" or "architecture.tag".
    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    # "pretrained" (timm downloads), "random" (tests), or a .safetensors/.pth file or URI.
    weights: str = "pretrained"
    # Block of a ViT or stage of a ConvNet whose output is taken; negative counts from the end.
    layer: int = -1
    # Input pixels: "224", or "HEIGHTxWIDTH".
    size: str = "224"
    # How an image of another shape gets there: centre crop, pad at the right or bottom, or squash.
    fit: Fit = "crop"
    # Components to keep; if omitted, 128, or all channels if the backbone has fewer.
    components: int | None = None
    # Images to fit the PCA basis on, spread evenly over the dataset; 0: all.
    pca_images: int = 2000
    # Images in one pass of the backbone; if omitted, 32 on a GPU, 4 on each core of a CPU.
    batch_size: int | None = None
    # "auto", "cpu" or "cuda".
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Ray actors, 0 for none: the job runs in this process. If omitted, a small job on a machine without a cluster and
    # with at most one GPU runs in this process, any other one has an actor for each GPU, or each node that has CPUs.
    workers: int | None = None
    # Images with more pixels than this are not opened (decompression bombs).
    max_pixels: int = MAX_PIXELS
    # Images with a shorter side are not used.
    min_side: int = MIN_SIDE

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        at_least("--limit", self.limit, 1)
        at_least("--components", self.components, 1)
        at_least("--pca-images", self.pca_images, 0)
        at_least("--batch-size", self.batch_size, 1)
        at_least("--workers", self.workers, 0)
        at_least("--min-side", self.min_side, 1)
        at_least("--max-pixels", self.max_pixels, self.min_side**2)
        parse_size("--size", self.size)

    @property
    def size_px(self) -> tuple[int, int]:
        """Input (height, width)."""
        return parse_size("--size", self.size)

    @property
    def output_size_px(self) -> tuple[int, int]:
        """(height, width) of the features that geometry (affine maps, valid boxes) refers to."""
        return self.size_px


@dataclass(frozen=True, kw_only=True)
class UpsampleConfig(UpsamplerOptions, FeatureConfig):
    """Images in, a feature store out."""

    # Where the store goes: a folder, s3://bucket/prefix or gs://bucket/prefix.
    store: str
    # Pixels of the stored features, "224" or "HEIGHTxWIDTH"; if omitted, --size.
    output_size: str | None = None
    # Basis to use, from jobs/fit_pca.py (.npz) or another store (its URI); if omitted, it is fitted on these images.
    pca: str | None = None
    # How features are stored.
    dtype: Literal["int8", "float16"] = "int8"
    # int8: common error floor of all components, in units of their root mean square. More is smaller and coarser.
    error_floor: float = 0.1
    # Images in a shard; if omitted, 64 for int8, 8 for float16, or fewer if the shard would exceed 512 MiB before
    # compression.
    shard_images: int | None = None
    # Only shards a up to (not including) b, "a:b": for splitting one store over several jobs.
    shards: str | None = None
    # Resume an existing store.
    resume: bool = False
    # Replace an existing store.
    overwrite: bool = False
    # Print the plan and exit.
    dry_run: bool = False
    # Exit with 1 if more than this share of the images failed; with 2, before the work, if the listing already shows
    # that more will fail: unsupported formats (.heic), broken links.
    max_failed_share: float = 0.01
    # Times a shard may fail before this run gives it up; losing a node does not count. --resume tries it again.
    attempts: int = 3
    # Seconds without progress after which a worker is replaced.
    stall_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        FeatureConfig.__post_init__(self)
        UpsamplerOptions.__post_init__(self)
        at_least("--shard-images", self.shard_images, 1)
        at_least("--attempts", self.attempts, 1)
        at_least("--error-floor", self.error_floor, 0)
        at_least("--stall-timeout-s", self.stall_timeout_s, 1)
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"--max-failed-share is a share: got {self.max_failed_share}, expected 0 … 1")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues the store, --overwrite replaces it: pass only one")
        if self.output_size is not None:
            parse_size("--output-size", self.output_size)
        self.shard_range(1)

    @property
    def output_size_px(self) -> tuple[int, int]:
        """(height, width) of the stored features."""
        return self.size_px if self.output_size is None else parse_size("--output-size", self.output_size)

    def shard_rows(self, image_nbytes: int) -> int:
        """Images in a shard of a new store, given the bytes of an image's features before compression."""
        return self.shard_images or max(1, min(SHARD_IMAGES[self.dtype], MOST_SHARD_BYTES // image_nbytes))

    def shard_range(self, shards: int) -> range:
        """The shards that this job is to make, of a store that has ``shards``."""
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
class FitPcaConfig(FeatureConfig):
    """Images in, a PCA basis out."""

    # The .npz file or URI to write.
    output: str

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        super().__post_init__()
        if not self.output.endswith(".npz"):
            raise ValueError(f"--output is a NumPy file: got {self.output!r}, expected a name that ends in .npz")


@dataclass(frozen=True, kw_only=True)
class FitPoolingConfig(FeatureConfig):
    """Images in, weights for --upsampler multiview out."""

    # The .safetensors file or URI to write.
    output: str
    # Images to fit on, spread evenly over the dataset; a quarter of them chooses the settings.
    fit_images: int = 24
    # Views of each image. More are better and slower: the backbone sees all of them.
    views: int = 21
    # Further views, which settings are judged on.
    held_out_views: int = 20
    # Pixels of the image in a cell of the solver's grid: 1 is slow, 4 is fast; a bilateral filter does the rest.
    solver_stride: int = 2

    def __post_init__(self) -> None:
        """Check what can be checked without looking at anything."""
        super().__post_init__()
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"--output: got {self.output!r}, expected a name that ends in .safetensors")
        at_least("--fit-images", self.fit_images, 4)
        at_least("--views", self.views, 2)
        at_least("--held-out-views", self.held_out_views, 1)
        at_least("--solver-stride", self.solver_stride, 1)
        if self.workers:
            raise ValueError(f"--workers {self.workers}: this job runs in one process, omit the option")
