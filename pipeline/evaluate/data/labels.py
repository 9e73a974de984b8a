"""Labels of a dataset, in files named by key: classes, depths, objects; and keypoints in one JSON file."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from densefeat.align import decode_png
from densefeat.storage.keyed_files import KeyedFiles
from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import Comparison, Split, split, spread
from schemas.evaluate_options import EvaluateConfig

__all__ = ["DepthFolder", "Labels", "check_split", "first_labelled", "labelled", "labelled_split", "read_keypoints"]

Array = npt.NDArray[Any]
# Labels of a key, [height, width] of its original image.
Labels = Callable[[str], Array]
_GREY = ("L", "I", "I;16")  # modes of Pillow


class DepthFolder:
    """Depths of a dataset: ``KEY.npy``, ``KEY.png``, or the same without the extension of the image.

    Args:
        folder: path or URI.
        scale: metres per unit of integer files; None: there are none. Others are in metres.
        limits: smallest and largest depth in metres; others become NaN.

    Attributes:
        files: the depths' files by key.
    """

    def __init__(self, folder: str, scale: float | None, limits: tuple[float, float]) -> None:
        self.files = KeyedFiles(Objects(folder), "depth", ".npy", ".png")
        self._scale, self._limits = scale, limits

    def __call__(self, key: str) -> Array:
        """Depth in metres, [height, width] float64; NaN where it is unknown.

        Raises:
            FileNotFoundError: there is no file for the key.
            ValueError: the file is no depth image.
            JobError: it is an integer image and there is no scale.
        """
        name, data = self.files.get(key)
        try:
            depth = _npy(data) if name.endswith(".npy") else decode_png(data, _GREY, "grey of 8 or 16 bits")
            if depth.ndim != 2 or depth.dtype.kind not in "iuf":
                raise ValueError(f"got {depth.dtype} {depth.shape}, expected [height, width]")
        except Exception as error:  # numpy has many for damaged files, such as one of a header without end
            raise ValueError(f"{name} is no depth image: {error}") from error
        return self._in_metres(depth)

    def _in_metres(self, depth: Array) -> Array:
        metres = depth.astype(np.float64)
        if depth.dtype.kind != "f":
            if self._scale is None:
                uri = self.files.objects.uri
                raise JobError(f"--labels {uri} has integer depths: pass --depth-scale, metres per unit")
            metres *= self._scale
        low, high = self._limits
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where((metres >= low) & (metres <= high), metres, np.nan))


def _npy(data: bytes) -> Array:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(loaded, np.ndarray):
        raise ValueError("it is an archive of arrays, expected one array")
    return loaded


def first_labelled(files: KeyedFiles, keys: Sequence[str], part: str = "images") -> str:
    """The first of ``keys`` that has a file of labels.

    Args:
        files: the labels.
        keys: of images.
        part: name of ``keys`` in messages.

    Raises:
        JobError: none has, or the folder is empty or does not exist.
    """
    try:
        first = files.first(keys)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise JobError(f"--labels: {error}") from error
    if first is None:
        raise JobError(
            f"--labels: none of the {len(keys)} {part} has labels: expected files named by key, such as {keys[0]}.png"
        )
    return first


def check_split(files: KeyedFiles, keys: Sequence[str], config: EvaluateConfig) -> tuple[str, str]:
    """The first training image and the first validation image that have files of labels, of those within --limit.

    Raises:
        JobError: there is none, or the images cannot be split.
    """
    whole = split(keys, config.train, config.val, config.seed)
    train, val = (
        first_labelled(files, spread(part, config.limit), f"{name} images")
        for name, part in (("training", whole.train), ("validation", whole.val))
    )
    return train, val


def labelled_split(
    comparison: Comparison, labels: Labels, usable: Callable[[str, Array], bool], config: EvaluateConfig
) -> Split:
    """Split the images, without those whose labels cannot be used, as `labelled`.

    Raises:
        JobError: a part has no image with labels, or the images cannot be split.
    """
    whole = split(comparison.keys, config.train, config.val, config.seed)
    train, val = (
        tuple(labelled(comparison, spread(part, config.limit), labels, usable, f"{name} images"))
        for name, part in (("training", whole.train), ("validation", whole.val))
    )
    return Split(train, val, whole.described)


def labelled(
    comparison: Comparison,
    keys: Sequence[str],
    labels: Labels,
    usable: Callable[[str, Array], bool],
    part: str = "images",
    expected: str = "a label",
) -> list[str]:
    """Those of ``keys`` whose labels can be used on the common grid; the others are noted, with their reasons.

    Args:
        comparison: the sides.
        keys: of images.
        labels: of a key.
        usable: of a key and its labels on the grid, [m, n]: whether they hold any.
        part: name of ``keys`` in messages.
        expected: what labels must hold, in messages.

    Raises:
        JobError: no image has labels.
    """
    found, absent, faulty, empty = [], dict[str, str](), dict[str, str](), dict[str, str]()
    for key in keys:
        try:
            if usable(key, comparison.grid(key).nearest(labels(key))):
                found.append(key)
            else:
                empty[key] = f"expected {expected} within the features"
        except (FileNotFoundError, NotADirectoryError) as error:
            absent[key] = str(error)
        except (ValueError, OSError) as error:
            faulty[key] = str(error)
    comparison.left_out(absent, "no labels")
    comparison.left_out(faulty, "labels that cannot be used")
    comparison.left_out(empty, "unlabelled")
    if not found:
        key, reason = next(iter((absent | faulty | empty).items()))
        raise JobError(f"--labels: none of the {len(keys)} {part} has usable labels; the first, {key}: {reason}")
    return found


def read_keypoints(uri: str) -> dict[str, npt.NDArray[np.float64]]:
    """Read a JSON object from keys to [[x, y], …] in pixels of the original image; null for a missing point.

    Point i of one image corresponds to point i of every other image of its group.

    Returns:
        Key -> [n, 2] float64, NaN where a point is missing.

    Raises:
        JobError: the file cannot be read, or is not of this form.
    """
    folder, name = split_place(uri)
    try:
        document = json.loads(Objects(folder).get(name))
        if not isinstance(document, dict):
            raise ValueError(f"got a {type(document).__name__}")
        return {key: _points(key, listed) for key, listed in document.items()}
    except (OSError, ValueError, OverflowError, RecursionError) as error:  # a number, or a nesting, without end
        raise JobError(f'--labels {uri}: expected a JSON object {{"KEY": [[x, y], null, …], …}}: {error}') from error


def _points(key: str, listed: object) -> npt.NDArray[np.float64]:
    if not isinstance(listed, list):
        raise ValueError(f"{key!r} has {listed!r}")
    points = np.full((len(listed), 2), np.nan)
    for number, point in enumerate(listed):
        if point is None:
            continue
        if not isinstance(point, list) or len(point) != 2 or not all(type(one) in (int, float) for one in point):
            raise ValueError(f"point {number} of {key!r} is {point!r}")
        points[number] = point
        if not np.isfinite(points[number]).all():
            raise ValueError(f"point {number} of {key!r} is {point!r}, expected finite numbers")
    return points
