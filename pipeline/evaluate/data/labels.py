"""Labels of a dataset, in files named by key: classes, depths, objects; and keypoints in one JSON file."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import Comparison

__all__ = ["DepthFolder", "Labels", "first_file", "labelled", "read_keypoints"]

Array = npt.NDArray[Any]
# Labels of a key, [height, width] of its original image.
Labels = Callable[[str], Array]


class DepthFolder:
    """Depths of a dataset: ``KEY.npy``, ``KEY.png``, or the same without the extension of the image.

    Args:
        folder: path or URI.
        scale: metres per unit of integer files; None: there are none. Others are in metres.
        limits: smallest and largest depth in metres; others become NaN.
    """

    def __init__(self, folder: str, scale: float | None, limits: tuple[float, float]) -> None:
        self._objects, self._scale, self._limits = Objects(folder), scale, limits

    def __call__(self, key: str) -> Array:
        """Depth in metres, [height, width] float64; NaN where it is unknown.

        Raises:
            FileNotFoundError: there is no file for the key.
            ValueError: the file is no depth image.
            JobError: it is an integer image and there is no scale.
        """
        stem = str(PurePosixPath(key).with_suffix(""))
        names = [f"{base}{suffix}" for base in dict.fromkeys((key, stem)) for suffix in (".npy", ".png")]
        for name in names:
            try:
                data = self._objects.get(name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            return self._in_metres(self._decoded(name, data))
        raise FileNotFoundError(f"{self._objects.uri} has no depth for {key!r}: expected {' or '.join(names)}")

    def check(self) -> None:
        """Refuse a folder that has no depths, or integer ones without a scale, before any work.

        Raises:
            JobError: as described.
        """
        name = first_file(self._objects, ".npy", ".png")
        if name is not None and name.endswith(".png") and self._scale is None:
            raise self._without_scale()

    def _decoded(self, name: str, data: bytes) -> Array:
        try:
            depth = _npy(data) if name.endswith(".npy") else _grey(data)
            if depth.ndim != 2 or depth.dtype.kind not in "iuf":
                raise ValueError(f"got {depth.dtype} {depth.shape}, expected [height, width]")
        except UnidentifiedImageError as error:  # its own message has an address in memory
            raise ValueError(f"{name} is no depth image: not a PNG file, or a damaged one") from error
        except (OSError, SyntaxError, ValueError, EOFError, BadZipFile) as error:  # numpy and Pillow, of damaged files
            raise ValueError(f"{name} is no depth image: {error}") from error
        return depth

    def _without_scale(self) -> JobError:
        return JobError(f"--labels {self._objects.uri} has integer depths: pass --depth-scale, metres per unit")

    def _in_metres(self, depth: Array) -> Array:
        metres = depth.astype(np.float64)
        if depth.dtype.kind != "f":
            if self._scale is None:
                raise self._without_scale()
            metres *= self._scale
        low, high = self._limits
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where((metres >= low) & (metres <= high), metres, np.nan))


def _npy(data: bytes) -> Array:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(loaded, np.ndarray):
        raise ValueError("it is an archive of arrays, expected one array")
    return loaded


def _grey(data: bytes) -> Array:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.mode not in ("L", "I", "I;16"):
            raise ValueError(f"got mode {image.mode}, expected grey of 8 or 16 bits")
        return np.asarray(image)


def first_file(folder: Objects, *suffixes: str) -> str | None:
    """The first file with one of ``suffixes`` in a local folder; None for a bucket, whose listing may take minutes.

    Raises:
        JobError: there is none.
    """
    if folder.local_path is None:
        return None
    names = [name for name in folder.list() if name.endswith(suffixes)]
    if not names:
        raise JobError(f"--labels {folder.uri}: got no {' or '.join(suffixes)} file, expected labels named by key")
    return min(names)


def labelled(
    comparison: Comparison,
    keys: Sequence[str],
    labels: Labels,
    usable: Callable[[str, Array], bool],
    part: str = "images",
) -> list[str]:
    """Those of ``keys`` whose labels can be used on the common grid; the others are noted, with their reasons.

    Args:
        comparison: the sides.
        keys: of images.
        labels: of a key.
        usable: of a key and its labels on the grid, [m, n]: whether they hold any.
        part: name of ``keys`` in messages.

    Raises:
        JobError: no image has labels.
    """
    found, absent, faulty, empty = [], dict[str, str](), dict[str, str](), dict[str, str]()
    for key in keys:
        try:
            if usable(key, comparison.grid(key).nearest(labels(key))):
                found.append(key)
            else:
                empty[key] = "no label within the features"
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
    except (OSError, ValueError) as error:
        raise JobError(f'--labels {uri}: expected a JSON object {{"KEY": [[x, y], null, …], …}}: {error}') from error


def _points(key: str, listed: object) -> npt.NDArray[np.float64]:
    if not isinstance(listed, list):
        raise ValueError(f"{key!r} has {listed!r}")
    points = np.full((len(listed), 2), np.nan)
    for number, point in enumerate(listed):
        if point is None:
            continue
        if not isinstance(point, list) or len(point) != 2 or not all(isinstance(one, int | float) for one in point):
            raise ValueError(f"point {number} of {key!r} is {point!r}")
        points[number] = point
    return points
