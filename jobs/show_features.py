"""Draw the features in a store beside their photos.

    python -m jobs.show_features --store features/ --output features.png

With ``--weights``, low-resolution features are recomputed with the store's backbone, and drawn in between; the weights
must be those that made the store.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from jobs.command_line import DONE, run
from pipeline.errors import JobError

if TYPE_CHECKING:
    from densefeat.store import FeatureStore

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Longest side in pixels: what WebP and libjpeg take; of PNG, what programs still open.
_LONGEST_PX = {"PNG": 65_500, "JPEG": 65_500, "WEBP": 16_383}


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Options: a store, and which of its rows to draw."""

    # Folder or URI of the store.
    store: str
    # File or URI of the picture to write.
    output: str = "features.png"
    # Rows to show, counted from the end if negative; by default, the first four that have features.
    rows: tuple[int, ...] = ()
    # Weights of the backbone as passed to the main job, to draw its low-resolution features beside the stored ones.
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options that need no access to files."""
        if _suffix(self.output) not in _FORMATS:
            raise ValueError(f"--output must be a picture, .png, .jpg or .webp: got {self.output}")


def show(config: ShowConfig) -> int:
    """Run the job; returns its exit code.

    Raises:
        StoreError: there is no store, or it is damaged.
        JobError: the picture cannot be written, or is too large for its format; the weights are not those that made the
            store; an image cannot be read; or a row has no features.
    """
    from densefeat.store import FeatureStore
    from jobs.pictures import comparison
    from pipeline.evaluate.data.originals import stored_backbone
    from pipeline.io.outputs import check_output_file, write_output_file

    store = FeatureStore(config.store)
    check_output_file("--output", config.output)  # before the work
    rows = _rows(store, config)
    _check_size(store, config, len(rows))
    picture = io.BytesIO()
    backbone = None if config.weights is None else stored_backbone(store, config.weights)
    comparison(store, rows, backbone).save(picture, _FORMATS[_suffix(config.output)])
    write_output_file("--output", config.output, picture.getvalue())
    print(config.output)
    return DONE


def _rows(store: "FeatureStore", config: ShowConfig) -> Sequence[int]:
    from schemas.index import OK

    statuses = store.index["status"].to_pylist()
    rows = config.rows or [row for row, status in enumerate(statuses) if status == OK][:4]
    if unknown := [row for row in rows if not -len(store) <= row < len(store)]:
        raise JobError(f"--rows {unknown}: the store has rows 0 … {len(store) - 1}")
    if without := [row for row in rows if statuses[row] != OK]:
        reasons = "; ".join(f"row {row} ({store.keys[row]}) is {statuses[row]}" for row in without)
        raise JobError(f"--rows {without} have no features: {reasons}. Leave them out")
    if not rows:
        raise JobError(f"no row of {config.store} has features: all failed, or their shards are not done yet")
    return rows


def _check_size(store: "FeatureStore", config: ShowConfig, rows: int) -> None:
    from jobs.pictures import comparison_size
    from pipeline.evaluate.data.originals import stored_geometry

    columns = 2 if config.weights is None else 3
    height, width = comparison_size(stored_geometry(store).size, columns, rows)
    kind = _FORMATS[_suffix(config.output)]
    if max(height, width) > _LONGEST_PX[kind]:
        raise JobError(
            f"--output {config.output}: {rows} rows make a picture of {height}×{width} pixels (height × width), "
            f"expected at most {_LONGEST_PX[kind]} on a side of a {kind} file: name fewer --rows"
        )


def _suffix(output: str) -> str:
    return PurePath(output).suffix.lower()


if __name__ == "__main__":
    run(ShowConfig, show, __doc__ or "")
