"""Options of jobs/evaluate.py. Every field is a command-line option; the comment above it is its help text."""

from dataclasses import dataclass
from typing import Literal

from schemas.checks import at_least, check_seed, positive

__all__ = ["EvaluateConfig", "TaskName"]

TaskName = Literal[
    "segmentation", "depth", "keypoints", "video", "discovery", "activation_maps", "held_out_views", "reconstruction"
]
TRAINED: tuple[TaskName, ...] = ("segmentation", "depth")
UNLABELLED: tuple[TaskName, ...] = ("activation_maps", "held_out_views", "reconstruction")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare features on a task."""

    # Task; docs/evaluation.md describes each, with its labels.
    task: TaskName
    # Features to compare, the baseline first: stores (folder or URI), or options of the main job for features that are
    # computed first, "backbone=…,weights=…,upsampler=jbu,components=64". "name=…" sets the name in the table, also for
    # a store: "name=jbu,store=features/".
    features: tuple[str, ...]
    # Folder or URI of the report: report.json and report.html.
    report: str
    # Labels of the task: a folder or URI of files named by key, or for keypoints a JSON file.
    labels: str | None = None
    # Images for features that are computed first, as for the main job.
    images: str | None = None
    # Folder in which stores of computed features are kept, and found again by later runs with the same options; delete
    # it when images change. If omitted, the stores are deleted at the end.
    stores: str | None = None
    # segmentation, depth: keys of the images to train on, as a pattern ("train/*"). If omitted, those in the folder
    # train if keys begin with train and val (or test), else a random half.
    train: str | None = None
    # segmentation, depth: keys of the images to evaluate on, as a pattern; pass it with --train.
    val: str | None = None
    # Look at only N images of each split, or of all for tasks without training, spread evenly; at N sequences of video.
    limit: int | None = None
    # segmentation, depth: probes per side, each trained on its own draw of images and pixels.
    runs: int = 5
    # segmentation, depth: pixels on which a probe is trained.
    pixels: int = 50_000
    # Seed of random splits, and of the draws of images and pixels.
    seed: int = 0
    # segmentation, discovery: values in masks that are not labels. Their pixels are left out.
    ignore: tuple[int, ...] = (255,)
    # segmentation: use only the N most frequent classes of the training images; if omitted, all.
    classes: int | None = None
    # depth: metres per unit of an integer image; required for PNG.
    depth_scale: float | None = None
    # depth: smallest and largest depth in metres that is used; other pixels are left out.
    depth_range: tuple[float, float] = (0.001, 10.0)
    # keypoints: α, as shares of the larger side of the box around the keypoints, or of the image.
    alphas: tuple[float, ...] = (0.05, 0.1)
    # keypoints: only pairs of images whose keys have the same first folder.
    same_folder: bool = True
    # video: rows of the grid on which labels are propagated; features are averaged over its cells.
    video_rows: int = 56
    # discovery: values of objects in the masks; if omitted, all but 0 and --ignore.
    objects: tuple[int, ...] = ()
    # discovery: rows of the grid that is cut in two; features are averaged over its cells.
    discovery_rows: int = 28
    # activation_maps, held_out_views, reconstruction: weights of the backbone that made the stores, as passed to the
    # main job.
    weights: str | None = None
    # Number of images shown in each section of the page.
    shown: int = 4

    def __post_init__(self) -> None:
        """Check everything that needs no access to data."""
        if not self.features:
            raise ValueError("--features: got none, expected a store or a configuration")
        if self.labels is None and self.task not in UNLABELLED:
            raise ValueError(f"--task {self.task} needs labels: pass --labels, see docs/evaluation.md")
        if self.labels is not None and self.task in UNLABELLED:
            raise ValueError(f"--task {self.task} uses no labels: leave out --labels")
        if self.task not in TRAINED and not self.train is self.val is None:
            raise ValueError(f"--task {self.task} trains nothing: leave out --train and --val")
        for option in ("limit", "runs", "pixels", "video_rows", "discovery_rows"):
            at_least(f"--{option.replace('_', '-')}", getattr(self, option), 1)
        check_seed(self.seed)
        at_least("--shown", self.shown, 0)
        at_least("--classes", self.classes, 2)
        if (self.train is None) != (self.val is None):
            raise ValueError("--train and --val are patterns of keys: pass both or neither")
        for depth in self.depth_range:
            at_least("--depth-range", depth, 0)
        if not self.depth_range[0] < self.depth_range[1]:
            raise ValueError(f"--depth-range is a range in metres: got {self.depth_range[0]} {self.depth_range[1]}")
        if self.depth_scale is not None:
            positive("--depth-scale", self.depth_scale)
        if not self.alphas:
            raise ValueError("--alphas: got none, expected shares such as 0.1")
        for alpha in self.alphas:
            positive("--alphas", alpha)
