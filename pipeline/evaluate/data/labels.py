"""Labels of a dataset, in files named by key: classes, depths, objects; and keypoints in one JSON file."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.errors import JobError
from pipeline.evaluate.data.comparison import Comparison

__all__ = ["DepthFolder", "Labels", "labelled", "read_keypoints"]

Array = npt.NDArray[Any]
# Labels of a key, [height, width] of its original image.
Labels = Callable[[str], Array]


class DepthFolder:
    """Depths of a dataset: ``KEY.npy``, ``KEY.png``, or the same without the extension of the image.

    Args:
        folder: path or URI.
        scale: metres per unit of an integer image; None: there are none.
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

    def _decoded(self, name: str, data: bytes) -> Array:
        if name.endswith(".npy"):
            depth: Array = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.mode not in ("L", "I", "I;16"):
                    raise ValueError(f"{name} is no depth image: got mode {image.mode}, expected grey of 8 or 16 bits")
                depth = np.asarray(image)
        if depth.ndim != 2 or depth.dtype.kind not in "iuf":
            raise ValueError(f"{name} is no depth image: got {depth.dtype} {depth.shape}, expected [height, width]")
        return depth

    def _in_metres(self, depth: Array) -> Array:
        if depth.dtype.kind != "f" and self._scale is None:
            raise JobError(f"{self._objects.uri} has integer depths: pass --depth-scale, metres per unit")
        metres = depth.astype(np.float64) * (1.0 if self._scale is None else self._scale)
        low, high = self._limits
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where((metres >= low) & (metres <= high), metres, np.nan))


def labelled(
    comparison: Comparison, keys: Sequence[str], labels: Labels, usable: Callable[[str, Array], bool]
) -> list[str]:
    """Those of ``keys`` whose labels can be used on the common grid; the others are noted, with their reasons.

    Args:
        comparison: the sides.
        keys: of images.
        labels: of a key.
        usable: of a key and its labels on the grid, [m, n]: whether they hold any.

    Raises:
        JobError: no image has labels.
    """
    found, absent, faulty, empty = [], dict[str, str](), dict[str, str](), dict[str, str]()
    for key in keys:
        try:
            if usable(key, comparison.grid(key).nearest(labels(key))):
                found.append(key)
            else:
                empty[key] = "no labelled pixel within the features"
        except (FileNotFoundError, NotADirectoryError) as error:
            absent[key] = str(error)
        except (ValueError, OSError) as error:
            faulty[key] = str(error)
    comparison.left_out(absent, "have no labels")
    comparison.left_out(faulty, "have labels that cannot be used")
    comparison.left_out(empty, "are unlabelled")
    if not found:
        reason = next(iter([*absent.values(), *faulty.values(), *empty.values()]), "there are no images")
        raise JobError(f"--labels: none of {len(keys)} images has usable labels; the first: {reason}")
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
        points = {
            key: np.array([[np.nan, np.nan] if point is None else point for point in listed], np.float64)
            for key, listed in document.items()
        }
        if wrong := [key for key, one in points.items() if one.ndim != 2 or one.shape[1] != 2]:
            raise ValueError(f"{wrong[0]!r} has {document[wrong[0]]}")
    except (OSError, ValueError, TypeError) as error:
        raise JobError(f'--labels {uri}: expected a JSON object {{"KEY": [[x, y], null, …], …}}: {error}') from error
    return points
