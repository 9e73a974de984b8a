"""Read the JSON documents and small arrays of a store, and check what the reader relies on."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from densefeat import layout
from densefeat.errors import StoreError
from densefeat.layout import FeatureLayout
from densefeat.storage.objects import Objects

__all__ = [
    "compact_attribute",
    "embedding_channels",
    "own_attributes",
    "read_attributes",
    "read_layout",
    "read_root",
    "read_small_array",
]

# Attributes that the reader and the pipeline require; their users check the others.
_ATTRIBUTE_TYPES: dict[str, type] = {"configuration": dict, "configuration_hash": str, "setup_complete": bool}
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_RESTORE = "restore it from a copy of the store, or create the store again with --overwrite"


def read_attributes(objects: Objects) -> dict[str, Any]:
    """Read the densefeat attributes of a store, finished or not (schemas/attributes.py defines them).

    Raises:
        StoreError: there is no densefeat store, its attributes are damaged, or its format version is unknown.
    """
    return own_attributes(objects.uri, read_root(objects))


def read_root(objects: Objects) -> dict[str, Any]:
    """Read the metadata document of the root group.

    Raises:
        StoreError: the document is missing or damaged.
    """
    try:
        return _json_object(objects.get(layout.ATTRIBUTES))
    except _ABSENT:
        raise StoreError(f"{objects.uri} is not a feature store: it has no {layout.ATTRIBUTES}") from None
    except ValueError as error:
        raise _no_store(objects.uri, error) from error


def own_attributes(uri: str, root: dict[str, Any]) -> dict[str, Any]:
    """Extract the densefeat attributes from the root document; errors as for `read_attributes`."""
    attributes = root.get("attributes", {})
    if not isinstance(attributes, dict):
        raise _no_store(uri, f"its attributes are {_shown(attributes)}")
    if layout.ATTRIBUTES_KEY not in attributes:
        raise StoreError(f"{uri} is a Zarr group, but not a feature store: it has no densefeat attributes")
    own = attributes[layout.ATTRIBUTES_KEY]
    if not isinstance(own, dict):
        raise _no_store(uri, f"its densefeat attributes are {_shown(own)}")
    version = own.get("format_version")
    known = (layout.FORMAT_VERSION, layout.COMPACT_FORMAT_VERSION)
    if type(version) is not int or version not in known:
        raise StoreError(
            f"{uri} has format version {version}, this densefeat supports {' and '.join(map(str, known))}: use the "
            "densefeat release that wrote it"
        )
    for name, kind in _ATTRIBUTE_TYPES.items():
        if not isinstance(own.get(name), kind):
            raise StoreError(
                f"{uri}: the attribute {name} in {layout.ATTRIBUTES} is {_shown(own.get(name))}, expected "
                f"{kind.__name__}; {_RESTORE}"
            )
    return own


def compact_attribute(uri: str, own: dict[str, Any]) -> dict[str, Any] | None:
    """The attribute ``compact``; None for a dense store.

    It has ``size`` [H, W] of the features, ``last_step``, an object with a ``name``, and perhaps ``guidance`` [H, W].

    Raises:
        StoreError: it is damaged, or missing although the format version is that of compact stores.
    """
    if own["format_version"] != layout.COMPACT_FORMAT_VERSION:
        return None
    compact = own.get("compact")
    sizes = [compact.get("size"), compact.get("guidance", [1, 1])] if isinstance(compact, dict) else []
    named = isinstance(compact, dict) and isinstance(compact.get("last_step"), dict)
    if not named or not all(
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size) for size in sizes
    ):
        raise StoreError(f"{uri}: the attribute compact in {layout.ATTRIBUTES} is {_shown(compact)}; {_RESTORE}")
    assert isinstance(compact, dict)
    return compact


def read_layout(objects: Objects, root: dict[str, Any]) -> FeatureLayout:
    """Read shape and sharding of the features.

    Args:
        objects: the store.
        root: its root document. The copy of the array's metadata in it (absent in stores of early versions) must
            agree: with different sharding, rows would be read from the wrong places. Only while rows are appended, and
            after, it may have fewer rows, which then count: it is written after the array's own document.

    Raises:
        StoreError: the array's metadata is missing, damaged, or not supported by this package.
    """
    key = f"{layout.FEATURES}/{layout.ATTRIBUTES}"
    try:
        features = FeatureLayout.from_metadata(_json_object(objects.get(key)))
        if root.get("consolidated_metadata") is not None:
            copy = FeatureLayout.from_metadata(root["consolidated_metadata"]["metadata"][layout.FEATURES])
            if replace(copy, rows=features.rows) != features or copy.rows > features.rows:
                raise ValueError(f"its copy in {layout.ATTRIBUTES} differs")
            features = copy
    except _ABSENT:
        raise StoreError(f"{objects.uri}: {key} is missing; {_RESTORE}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{objects.uri}: {key} is damaged: {error}; {_RESTORE}") from error
    return features


def embedding_channels(objects: Objects, features: FeatureLayout) -> int | None:
    """D of the array ``embedding`` [rows, D]; None if the store has none. It has more rows if some were appended since.

    Raises:
        StoreError: its metadata is damaged.
    """
    key = f"{layout.EMBEDDING}/{layout.ATTRIBUTES}"
    try:
        metadata = _json_object(objects.get(key))
        (rows, channels), dtype = metadata["shape"], metadata["data_type"]
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if rows < features.rows or (dtype, chunk) != ("float16", [features.shard_rows, channels]):
            raise ValueError(f"got {dtype} [{rows}, {channels}] in chunks of {chunk}")
        if type(channels) is not int or channels < 1:
            raise ValueError(f"got {channels!r} channels")
        return channels
    except _ABSENT:
        return None
    except PermissionError:  # as some storages answer for missing objects
        copies = (read_root(objects).get("consolidated_metadata") or {}).get("metadata", {})
        if not copies or layout.EMBEDDING in copies:
            raise
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{objects.uri}: {key} is damaged: {error}; {_RESTORE}") from error


def read_small_array(objects: Objects, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Read an array of one chunk as ``dtype``, without listing, which some storages do not support.

    Raises:
        StoreError: the array is missing, damaged, or has several chunks.
    """
    keys = [f"{name}/{layout.ATTRIBUTES}"]
    try:
        documents = [objects.get(keys[0])]
        metadata = _json_object(documents[0])
        shape = metadata.get("shape")
        if not isinstance(shape, list) or metadata.get("chunk_grid", {}).get("configuration") != {"chunk_shape": shape}:
            raise ValueError(f"expected an array of one chunk: got the shape {_shown(shape)}")
        keys.append("/".join([name, "c", *["0"] * len(shape)]))
        documents.append(objects.get(keys[1]))
    except _ABSENT:
        part = "" if len(keys) == 1 else "a part of "
        raise StoreError(f"{objects.uri}: {part}the array {name} is missing ({keys[-1]}); {_RESTORE}") from None
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{objects.uri}: the array {name} is damaged: {error}; {_RESTORE}") from error
    buffer = default_buffer_prototype().buffer
    store = MemoryStore({key: buffer.from_bytes(data) for key, data in zip(keys, documents, strict=True)})
    try:
        array = np.asarray(zarr.open_array(store, path=name, mode="r", zarr_format=3)[...], dtype=dtype)
    except Exception as error:  # from zarr's parser, in memory: a damaged document can raise anything
        raise StoreError(f"{objects.uri}: the array {name} is damaged: {error}; {_RESTORE}") from error
    if not np.isfinite(array).all():
        raise StoreError(f"{objects.uri}: the array {name} is damaged: it has non-finite values; {_RESTORE}")
    return array


def _no_store(uri: str, reason: object) -> StoreError:
    return StoreError(f"{uri} is not a feature store: its {layout.ATTRIBUTES} is damaged: {reason}")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"it is {_shown(document)}, not a JSON object")
    return document


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"
