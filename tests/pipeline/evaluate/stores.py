"""Stores with given features, and labels beside them, for evaluations with known answers."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from densefeat import layout
from densefeat.layout import FeatureLayout
from densefeat.storage.objects import Objects
from pipeline.evaluate.data.comparison import Comparison
from pipeline.evaluate.data.sides import Side
from pipeline.features.pca import Basis
from pipeline.images.listing.source import keys_digest
from pipeline.store.layout import finish, set_up
from pipeline.store.shard import NewShard, write_shard
from schemas.attributes import StoreAttributes
from schemas.configuration import (
    GeometryConfiguration,
    PcaConfiguration,
    SourceConfiguration,
    StorageConfiguration,
    StoreConfiguration,
)
from schemas.evaluate_options import EvaluateConfig
from schemas.index import OK, REFERENCES, pending_index
from schemas.ledger import RowOutcome

Geometry = tuple[tuple[int, int], tuple[float, ...], tuple[int, int, int, int]]  # original (h, w), affine, valid box


def store_of(
    folder: Path,
    features: Mapping[str, np.ndarray | None],
    geometry: Geometry | None = None,
    mean: np.ndarray | None = None,
) -> str:
    """A finished float16 store of features [k, H, W] by key; None: a failed row. The basis is the identity.

    Args:
        folder: to write to; the photographs' places are in ``folder.parent / "photos"``.
        features: by key, all of one shape.
        geometry: of every row; None: the original has the size of the features.
        mean: [k] of the basis; None: zero.
    """
    k, height, width = next(array.shape for array in features.values() if array is not None)
    size, affine, box = geometry or ((height, width), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0, 0, height, width))
    columns = {
        "key": list(features),
        "uri": [str(folder.parent / "photos" / key) for key in features],
        "offset": [None] * len(features),
        "nbytes": [None] * len(features),
        "label": [None] * len(features),
    }
    references = pa.table(columns, schema=REFERENCES)
    centre = np.zeros(k, np.float32) if mean is None else mean.astype(np.float32)
    variance = np.arange(k, 0, -1, dtype=np.float64)
    basis = Basis(centre, np.eye(k, dtype=np.float32), variance, variance / variance.sum())
    configuration = StoreConfiguration(
        source=SourceConfiguration("/photos", None, "folder", None, len(features), keys_digest(references)),
        backbone={"name": "test"},
        geometry=GeometryConfiguration((height, width), "crop", (height, width), 1 << 20, 1),
        pca=PcaConfiguration(k, None, basis.digest),
        upsampler={"name": "bilinear"},
        storage=StorageConfiguration("float16", len(features), 1),
    )
    attributes = StoreAttributes(configuration, {"densefeat": "test"}, (), 1.0, None)
    objects, rows = Objects(str(folder)), len(features)
    set_up(
        objects,
        attributes,
        FeatureLayout(rows, k, height, width, "float16", rows),
        basis,
        None,
        pending_index(references),
    )
    outcomes = [
        RowOutcome(row, "corrupt", "image file is truncated")
        if array is None
        else RowOutcome(row, OK, None, *size, affine, box)
        for row, array in enumerate(features.values())
    ]
    chunks = [None if one is None else layout.encode_chunk(one.astype(np.float16)) for one in features.values()]
    facts = {"configuration_hash": attributes.hash, "clipped": 0, "made_by": {"device": "test"}}
    finish(objects, [write_shard(objects, NewShard(0, rows, chunks, outcomes, facts))])
    return str(folder)


def compared(**stores: str) -> Comparison:
    """A comparison of stores by name."""
    return Comparison([Side.of(name, uri) for name, uri in stores.items()])


def config(task: str, labels: Path | None, report: Path, **options: Any) -> EvaluateConfig:
    """Options with two runs on few pixels."""
    own: dict[str, Any] = {"features": ("unused",), "runs": 2, "pixels": 2000, "shown": 1}
    return EvaluateConfig(
        task=task, labels=None if labels is None else str(labels), report=str(report), **{**own, **options}
    )


def write_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    path.write_bytes(data.getvalue())
