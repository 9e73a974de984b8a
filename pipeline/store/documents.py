"""The Zarr documents and small arrays of a store: what other libraries read it by (xarray, tensorstore, zarrs, …)."""

import json
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from densefeat import layout
from densefeat.layout import FeatureLayout
from pipeline.features.pca import Basis
from schemas.attributes import StoreAttributes

__all__ = ["zarr_documents"]

_FEATURE_DIMENSIONS = ("row", "component", "y", "x")
# Names of the axes, and what the array holds.
_SMALL_ARRAYS: dict[str, tuple[tuple[str, ...], str]] = {
    layout.STEP: (("component",), "quantization step: feature = code × step"),
    f"{layout.PCA}/mean": (("channel",), "mean of the backbone's features"),
    f"{layout.PCA}/components": (("component", "channel"), "PCA basis of the backbone's features, orthonormal rows"),
    f"{layout.PCA}/explained_variance": (("component",), "variance of the backbone's features along each component"),
    f"{layout.PCA}/explained_variance_ratio": (("component",), "share of the variance along each component"),
}


def zarr_documents(
    attributes: StoreAttributes, features: FeatureLayout, basis: Basis, step: np.ndarray[Any, Any] | None
) -> dict[str, bytes]:
    """Key → bytes of all metadata and small arrays, made by zarr-python in memory.

    The root's document also holds those of all that is below (Zarr's consolidated metadata): libraries that use it
    need no listing to open the store, and those that do not know it pass over it.
    """
    stored: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(stored), zarr_format=3, attributes=attributes.to_dict())
    int8 = features.dtype == "int8"
    group.create_array(
        layout.FEATURES,
        shape=(features.rows, *features.image_shape),
        dtype=features.dtype,
        chunks=(1, *features.image_shape),
        shards=(features.shard_rows, *features.image_shape),
        filters=None,
        compressors=[ZstdCodec(level=layout.ZSTD_LEVEL), Crc32cCodec()],
        fill_value=layout.INT8_NO_DATA if int8 else float("nan"),
        dimension_names=_FEATURE_DIMENSIONS,
        attributes=_feature_attributes(int8),
    )
    group.create_group(layout.PCA)
    for name, data in basis.__dict__.items():
        _create_small_array(group, f"{layout.PCA}/{name}", data)
    if step is not None:
        _create_small_array(group, layout.STEP, step)
    documents = {key: buffer.to_bytes() for key, buffer in stored.items()}
    return {**documents, layout.ATTRIBUTES: _consolidated(documents)}


def _feature_attributes(int8: bool) -> dict[str, Any]:
    """As CF conventions and xarray read them."""
    if not int8:  # NaN, where there is no data, needs no attribute
        return {"long_name": "dense image features", "units": "1"}
    # xarray reads Zarr's fill value as a value like any other, and this attribute as "no data".
    return {
        "long_name": f"dense image features, quantized: feature = code × {layout.STEP}",
        "units": "1",
        "_FillValue": layout.INT8_NO_DATA,
    }


def _create_small_array(group: zarr.Group, name: str, data: np.ndarray[Any, Any]) -> None:
    """One chunk, with a checksum. The fill value is NaN: a chunk that is lost must not read as zeros."""
    dimensions, long_name = _SMALL_ARRAYS[name]
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=data.shape,
        filters=None,
        compressors=[ZstdCodec(level=layout.ZSTD_LEVEL), Crc32cCodec()],
        fill_value=float("nan"),
        dimension_names=dimensions,
        attributes={"long_name": long_name},
    )
    array[...] = data


def _consolidated(documents: dict[str, bytes]) -> bytes:
    """The root's document with those of all that is below it.

    As ``zarr.consolidate_metadata`` writes them; that warns each time that this is not yet in Zarr's specification.
    """
    suffix = f"/{layout.ATTRIBUTES}"
    below = {key.removesuffix(suffix): json.loads(data) for key, data in documents.items() if key.endswith(suffix)}
    root = json.loads(documents[layout.ATTRIBUTES])
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": below}
    return json.dumps(root, indent=2).encode()
