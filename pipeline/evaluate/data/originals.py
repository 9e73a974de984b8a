"""The original images of a store as the backbone saw them, and the backbone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densefeat.store import FeatureStore
from pipeline.errors import ImageError, JobError
from pipeline.evaluate.data.sides import PlannedSide, Side
from pipeline.features.backbone import Backbone, build_backbone
from pipeline.images.decoding.decode import Geometry, decode
from pipeline.images.reading.read import read_images
from pipeline.store.layout import stored_attributes
from schemas.configuration import StoreConfiguration

__all__ = ["backbone_of", "check_weights", "on_image", "read_photo", "stored_backbone", "stored_geometry"]


def stored_geometry(store: FeatureStore) -> Geometry:
    """Geometry with which a store was made."""
    return _geometry(stored_attributes(store.uri, store.attributes).configuration)


def _geometry(configuration: StoreConfiguration) -> Geometry:
    geometry = configuration.geometry
    return Geometry(geometry.size, geometry.fit, geometry.output_size)


def read_photo(store: FeatureStore, row: int) -> npt.NDArray[np.uint8]:
    """Read the image of a row from where the index says it lies, as the backbone saw it: uint8 [3, H, W].

    Raises:
        JobError: the image cannot be read.
    """
    image = store.index.slice(row % len(store), 1)
    uri = image["uri"][0].as_py()
    configuration = stored_attributes(store.uri, store.attributes).configuration
    source = configuration.source
    try:
        with ThreadPoolExecutor(2) as pool:
            (data,) = read_images(image, image_column=source.image_column, kind=source.kind, pool=pool)
        if isinstance(data, ImageError):
            raise data
        limits = configuration.geometry
        return decode(data, _geometry(configuration), max_pixels=limits.max_pixels, min_side=limits.min_side).pixels
    except ImageError as error:
        raise JobError(f"the image of row {row} cannot be read from {uri}: {error}") from error


def on_image(store: FeatureStore, key: str, grid: tuple[int, int]) -> Tensor:
    """Cells of a grid (h, w) over an image as the backbone saw it whose centre is not on padding: [h, w] bool."""
    box, size = store.geometry(key).valid_box, store.shape[1:]
    inside = []
    for axis in range(2):
        centres = (np.arange(grid[axis]) + 0.5) * size[axis] / grid[axis]
        inside.append((centres >= box[axis]) & (centres < box[axis + 2]))
    return torch.from_numpy(inside[0][:, None] & inside[1])


def backbone_of(side: Side, weights: str | None) -> Backbone:
    """The backbone that made a side's features.

    Args:
        side: if its features were computed here, it knows its weights.
        weights: value of --weights, for a store; see `check_weights`.

    Raises:
        JobError: the weights are not those that made the store.
    """
    return stored_backbone(side.store, str(side.weights or weights))


def check_weights(sides: Sequence[PlannedSide], weights: str | None) -> None:
    """Refuse sides whose backbone is needed, but not its weights known.

    Args:
        sides: all of them.
        weights: value of --weights.

    Raises:
        JobError: as described.
    """
    for side in sides:
        if side.weights is None and weights is None:
            raise JobError(f"--features {side.name}: the backbone is needed: pass its weights as --weights")


def stored_backbone(store: FeatureStore, weights: str) -> Backbone:
    """The backbone that made a store.

    Args:
        store: whose configuration names the backbone, its layers and size.
        weights: "pretrained", or the file or URI of a checkpoint.

    Raises:
        JobError: the weights are not those that made the store.
    """
    stored = stored_attributes(store.uri, store.attributes).configuration
    made_by = stored.backbone
    chosen = {name: made_by[name] for name in ("space", "facet") if name in made_by}
    backbone = build_backbone(
        made_by["name"], size=stored.geometry.size, weights=weights, layer=made_by["layer"], **chosen
    )
    if backbone.identity()["weights"] != made_by["weights"]:
        raise JobError(f"--weights {weights} are not those that made {store.uri}: pass those, or omit --weights")
    return backbone
