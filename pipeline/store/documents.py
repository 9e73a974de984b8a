"""Zarr metadata and small arrays of a store, which other libraries (xarray, tensorstore, zarrs, …) need to read it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from densefeat import layout
from densefeat.layout import FeatureLayout
from densefeat.storage.guidance import CODECS
from pipeline.features.pca import Basis
from schemas.attributes import StoreAttributes

__all__ = ["zarr_documents"]

_FEATURE_DIMENSIONS = ("row", "component", "y", "x")
# Array -> names of its dimensions, and its long_name.
_SMALL_ARRAYS: dict[str, tuple[tuple[str, ...], str]] = {
    layout.STEP: (("component",), "quantization step: feature = code × step"),
    f"{layout.PCA}/mean": (("channel",), "mean of the backbone's features"),
    f"{layout.PCA}/components": (("component", "channel"), "PCA basis of the backbone's features, orthonormal rows"),
    f"{layout.PCA}/explained_variance": (("component",), "variance of the backbone's features along each component"),
    f"{layout.PCA}/explained_variance_ratio": (("component",), "share of the variance along each component"),
    f"{layout.UPSAMPLER}/bias": (
        ("component", "cell_y", "cell_x"),
        "positional bias of the backbone's features, not contained in the stored ones",
    ),
}


def zarr_documents(
    attributes: StoreAttributes,
    features: FeatureLayout,
    basis: Basis,
    step: np.ndarray[Any, Any] | None,
    upsampler: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, bytes]:
    """Build all metadata and small arrays with zarr-python in memory; returns key → bytes.

    The root document also holds the metadata of all nodes below it (Zarr's consolidated metadata). Libraries that use
    it need no listing to open the store, and libraries that do not know it ignore it.
    """
    stored: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(stored), zarr_format=3, attributes=attributes.to_dict())
    int8, compact = features.dtype == "int8", attributes.compact or {}
    group.create_array(
        layout.FEATURES,
        shape=(features.rows, *features.image_shape),
        dtype=features.dtype,
        chunks=(1, *features.image_shape),
        shards=(features.shard_rows, *features.image_shape),
        filters=None,
        compressors=_compressors(),
        fill_value=layout.INT8_NO_DATA if int8 else float("nan"),
        dimension_names=_FEATURE_DIMENSIONS,
        attributes=_feature_attributes(int8, bool(compact)),
    )
    if (channels := attributes.configuration.storage.embedding) is not None:
        group.create_array(
            layout.EMBEDDING,
            shape=(features.rows, channels),
            dtype="float16",
            chunks=(features.shard_rows, channels),
            filters=None,
            compressors=_compressors(),
            fill_value=float("nan"),
            dimension_names=("row", "embedding_channel"),
            attributes={"long_name": "pooled features of the image", "units": "1"},
        )
    group.create_group(layout.PCA)
    for name, data in basis.__dict__.items():
        _create_small_array(group, f"{layout.PCA}/{name}", data)
    if step is not None:
        _create_small_array(group, layout.STEP, step)
    if upsampler:
        group.create_group(layout.UPSAMPLER)
        for name, data in upsampler.items():
            _create_small_array(group, f"{layout.UPSAMPLER}/{name}", data)
    documents = {key: buffer.to_bytes() for key, buffer in stored.items()}
    documents[layout.ATTRIBUTES] = _consolidated(documents)
    if size := compact.get("guidance"):
        documents[f"{layout.GUIDANCE}/{layout.ATTRIBUTES}"] = _guidance_document(features, size)
    return documents


def _guidance_document(features: FeatureLayout, size: Sequence[int]) -> bytes:
    """Metadata of the guidance images [N, H, W, 3] uint8.

    It is not in the consolidated metadata: libraries without the codec could not open the group any more.
    """
    sharding = {
        "chunk_shape": [1, *size, 3],
        "codecs": CODECS,
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "start",  # so that it can be read without knowing the size of the object
    }
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [features.rows, *size, 3],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [features.shard_rows, *size, 3]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
        "dimension_names": ["row", "guidance_y", "guidance_x", "rgb"],
        "attributes": {"long_name": "images that guide the last step of upsampling"},
    }
    return json.dumps(metadata, indent=2).encode()


def _feature_attributes(int8: bool, compact: bool) -> dict[str, Any]:
    """Attributes of the feature array, following CF conventions and xarray."""
    name = "components before the last step of upsampling" if compact else "dense image features"
    if not int8:  # missing data is NaN, which needs no attribute
        return {"long_name": name, "units": "1"}
    # xarray treats Zarr's fill value as an ordinary value, and `_FillValue` as "no data".
    return {
        "long_name": f"{name}, quantized: feature = code × {layout.STEP}",
        "units": "1",
        "_FillValue": layout.INT8_NO_DATA,
    }


def _compressors() -> list[Any]:
    return [ZstdCodec(level=layout.ZSTD_LEVEL), Crc32cCodec()]


def _create_small_array(group: zarr.Group, name: str, data: np.ndarray[Any, Any]) -> None:
    """Create an array of one chunk with a checksum. The fill value is NaN: a lost chunk must not read as zeros."""
    dimensions, long_name = _SMALL_ARRAYS[name]
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=data.shape,
        filters=None,
        compressors=_compressors(),
        fill_value=float("nan"),
        dimension_names=dimensions,
        attributes={"long_name": long_name},
    )
    array[...] = data


def _consolidated(documents: dict[str, bytes]) -> bytes:
    """The root document, with the metadata of all nodes below it.

    The format is that of ``zarr.consolidate_metadata``, which is not called because it warns each time that
    consolidated metadata is not yet in the Zarr specification.
    """
    suffix = f"/{layout.ATTRIBUTES}"
    below = {key.removesuffix(suffix): json.loads(data) for key, data in documents.items() if key.endswith(suffix)}
    root = json.loads(documents[layout.ATTRIBUTES])
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": below}
    return json.dumps(root, indent=2).encode()
