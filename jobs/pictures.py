"""Pictures of features next to their images: photo | low-resolution features | high-resolution features."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from densefeat.store import FeatureStore
from pipeline.errors import ImageError, JobError
from pipeline.features.backbone import Backbone
from pipeline.images.decoding.decode import Geometry, decode
from pipeline.images.reading.read import read_images
from pipeline.store.layout import stored_attributes
from schemas.configuration import StoreConfiguration

Pixels = npt.NDArray[np.uint8]

_GAP_PX = 8
# Number of components, at most three -> indices of the red, green and blue component.
_CHANNELS = {1: [0, 0, 0], 2: [0, 1, 1], 3: [0, 1, 2]}
_PERCENTILES = (1, 99)  # so that a few extreme values do not make everything else grey


def feature_colours(features: Sequence[npt.NDArray[np.float32]]) -> list[Pixels]:
    """Components as colours, uint8 [H, W, 3], on a common scale for all of ``features`` ([k, H, W] each).

    The first three components are red, green and blue. The second of two is both green and blue; a single one is grey.
    """
    shown = [image[_CHANNELS[min(len(image), 3)]] for image in features]
    values = np.concatenate([image.reshape(3, -1) for image in shown], axis=1)
    low, high = np.percentile(values, _PERCENTILES, axis=1)
    scale = np.maximum(high - low, np.finfo(np.float32).tiny)[:, None, None]
    return [
        (np.clip((image - low[:, None, None]) / scale, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        for image in shown
    ]


def stored_geometry(store: FeatureStore) -> Geometry:
    """Geometry with which a store was made."""
    return _geometry(stored_attributes(store.uri, store.attributes).configuration)


def _geometry(configuration: StoreConfiguration) -> Geometry:
    geometry = configuration.geometry
    return Geometry(geometry.size, geometry.fit, geometry.output_size)


def read_photo(store: FeatureStore, row: int) -> npt.NDArray[np.uint8]:
    """Read the image of a row from its URI in the index, as the backbone saw it: uint8 [3, H, W].

    Raises:
        JobError: the image cannot be read, or is not in a file of its own (only folders of images are supported).
    """
    image = store.index.slice(row % len(store), 1)
    uri = image["uri"][0].as_py()
    configuration = stored_attributes(store.uri, store.attributes).configuration
    if configuration.source.kind != "folder":
        raise JobError(f"row {row} lies inside {uri}: pictures need images that are files of their own")
    try:
        with ThreadPoolExecutor(1) as pool:
            (data,) = read_images(image, image_column=None, kind="folder", pool=pool)
        if isinstance(data, ImageError):
            raise data
        return decode(data, _geometry(configuration)).pixels
    except ImageError as error:
        raise JobError(f"the image of row {row} cannot be read from {uri}: {error}") from error


def comparison(store: FeatureStore, rows: Sequence[int], backbone: Backbone | None) -> Image.Image:
    """Picture with one line per row: photo | low-resolution features (if there is a backbone) | stored features.

    Both kinds of features are coloured by the store's first three components, each kind on a common scale for all rows.
    """
    photos = [read_photo(store, row) for row in rows]
    high = feature_colours([store.read(row) for row in rows])
    columns: list[list[Pixels]] = [[photo.transpose(1, 2, 0) for photo in photos]]
    if backbone is not None:
        with torch.inference_mode():
            features = backbone(torch.from_numpy(np.stack(photos))).numpy()
        centred = features - store.mean[:, None, None]
        columns.append(feature_colours(list(np.einsum("kc,bchw->bkhw", store.components[:3], centred))))
    columns.append(high)
    return _grid(columns, photos[0].shape[1:])


def _grid(columns: Sequence[Sequence[Pixels]], size: tuple[int, ...]) -> Image.Image:
    """Tiles of ``size`` (height, width) on white, enlarged without interpolation so that the resolution is visible."""
    height, width = size
    picture = Image.new(
        "RGB",
        (len(columns) * (width + _GAP_PX) - _GAP_PX, len(columns[0]) * (height + _GAP_PX) - _GAP_PX),
        "white",
    )
    for x, column in enumerate(columns):
        for y, tile in enumerate(column):
            enlarged = Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(enlarged, (x * (width + _GAP_PX), y * (height + _GAP_PX)))
    return picture
