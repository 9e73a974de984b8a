"""Pictures of features next to their images: photo | low-resolution features | high-resolution features."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from densefeat.store import FeatureStore
from pipeline.evaluate.data.originals import read_photo
from pipeline.features.backbone import Backbone

Pixels = npt.NDArray[np.uint8]

_GAP_PX = 8
_FONT_PX = 12
_HEADING_PX = 2 * _FONT_PX  # above the columns, and below each tile
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


def comparison(store: FeatureStore, rows: Sequence[int], backbone: Backbone | None) -> Image.Image:
    """Picture with one line per row: photo | low-resolution features (if there is a backbone) | stored features.

    Both kinds of features are coloured by the store's first three components, each kind on a common scale for all rows.
    Above each column is what it shows, and its size; below each photo is its key.
    """
    photos = [read_photo(store, row) for row in rows]
    high = feature_colours([store.read(row) for row in rows])
    columns: list[list[Pixels]] = [[photo.transpose(1, 2, 0) for photo in photos]]
    headings = ["photo"]
    if backbone is not None:
        with torch.inference_mode():
            features = backbone(torch.from_numpy(np.stack(photos))).numpy()
        centred = features - store.mean[:, None, None]
        columns.append(feature_colours(list(np.einsum("kc,bchw->bkhw", store.components[:3], centred))))
        headings.append("features of the backbone")
    columns.append(high)
    headings.append("features in the store")
    for number, column in enumerate(columns):
        headings[number] += f", {column[0].shape[1]}×{column[0].shape[0]}"
    return _grid(columns, headings, [store.keys[row] for row in rows], photos[0].shape[1:])


def comparison_size(tile: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """(height, width) in pixels of a picture of so many tiles of (height, width) pixels."""
    height, width = tile
    return _HEADING_PX + rows * (height + _HEADING_PX), columns * (width + _GAP_PX) - _GAP_PX


def _grid(
    columns: Sequence[Sequence[Pixels]], headings: Sequence[str], captions: Sequence[str], size: tuple[int, ...]
) -> Image.Image:
    """Tiles of ``size`` (height, width) on white, enlarged without interpolation so that the resolution is visible.

    Args:
        columns: uint8 [H, W, 3] each, as many in every column.
        headings: above each column.
        captions: below each tile of the first column.
        size: of a tile, in pixels.
    """
    height, width = size
    # matplotlib brings a font of many scripts; Pillow's own has ASCII only.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT_PX)
    across, down = width + _GAP_PX, height + _HEADING_PX
    picture = Image.new("RGB", comparison_size((height, width), len(columns), len(captions))[::-1], "white")
    draw = ImageDraw.Draw(picture)
    for x, column in enumerate(columns):
        draw.text((x * across, _HEADING_PX // 4), _fitted(headings[x], font, width), "black", font)
        for y, tile in enumerate(column):
            enlarged = Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(enlarged, (x * across, _HEADING_PX + y * down))
    for y, caption in enumerate(captions):
        below = _HEADING_PX + y * down + height + _HEADING_PX // 8
        draw.text((0, below), _fitted(caption, font, width, keep_end=True), "dimgrey", font)
    return picture


def _fitted(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, *, keep_end: bool = False
) -> str:
    """Shorten a text to a width in pixels, marked by an ellipsis; paths keep their end."""
    # Names may hold line breaks, and bytes that are no text.
    text = shortened = "".join(one if one.isprintable() else "�" for one in text)
    while text and font.getlength(shortened) > width:
        text = text[1:] if keep_end else text[:-1]
        shortened = f"…{text}" if keep_end else f"{text}…"
    return shortened
