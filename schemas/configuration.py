"""The configuration of a store: everything that its features depend on, and nothing else.

Two stores with the same hash hold the same features, up to floating-point differences between devices. Only *requested*
values determine whether a job may work on a store; *results* (a fitted basis, measured steps) are taken from the store.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

__all__ = [
    "FITTED",
    "MAX_PIXELS",
    "MIN_SIDE",
    "Facet",
    "Fit",
    "GeometryConfiguration",
    "PcaConfiguration",
    "Quality",
    "Represent",
    "SourceConfiguration",
    "SourceKind",
    "Space",
    "StorageConfiguration",
    "StoreConfiguration",
    "differences",
    "incompatibilities",
]


MAX_PIXELS = 178_956_970  # default maximum per image: Pillow refuses more as a decompression bomb
MIN_SIDE = 8  # default minimum side of an image, in pixels

FITTED = "fitted"  # in the upsampler's part: the identity of its fit to the images
Fit = Literal["crop", "pad", "squash"]  # crop to the aspect ratio, pad to it, or distort to it
Space = Literal["layer", "head"]  # of the features: the layer's own, or that of the model's output
Represent = Literal["dense", "half", "compact"]  # features, at half the resolution, or before the last step
Quality = Literal["high", "balanced", "small"]
Facet = Literal["token", "value"]  # of a ViT's last block: its output, or the values of its attention
SourceKind = Literal["folder", "list", "tar", "parquet"]


@dataclass(frozen=True)
class _Part:
    """A part of the configuration: flat, with JSON types. Fields with default None are omitted if None."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        known = {field.name: field.default for field in fields(cls)}
        if unknown := sorted(values.keys() - known.keys()):
            raise ValueError(f"unknown fields {', '.join(unknown)}: the store was written by a newer densefeat")
        try:
            return cls(**{name: _frozen(value) for name, value in values.items()})
        except TypeError as error:  # its message names the missing fields
            raise ValueError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        optional = {field.name for field in fields(self) if field.default is None}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if not (value is None and name in optional)
        }


@dataclass(frozen=True)
class SourceConfiguration(_Part):
    """The images of the store.

    Attributes:
        images: absolute path or URI of the dataset, as given.
        limit: maximum number of images; None: all.
        kind: how the images are stored.
        image_column: Parquet: the column that holds the images; tar: the requested extension; else None.
        rows: number of images.
        keys_sha256: SHA-256 (hex) of their keys, in order.
    """

    images: str
    limit: int | None
    kind: SourceKind
    image_column: str | None
    rows: int
    keys_sha256: str


@dataclass(frozen=True)
class GeometryConfiguration(_Part):
    """How images are placed on the grid of the features.

    Attributes:
        size: (height, width) in pixels of the backbone's input.
        fit: how images of another aspect ratio are adapted.
        output_size: (height, width) of the stored features.
        max_pixels: images with more pixels are failed rows.
        min_side: images with a shorter side are failed rows.
    """

    size: tuple[int, int]
    fit: Fit
    output_size: tuple[int, int]
    max_pixels: int
    min_side: int


@dataclass(frozen=True)
class PcaConfiguration(_Part):
    """The basis of the components.

    Attributes:
        components: k; None: as many as explain the share, and not fitted yet.
        fitted_on_images: requested size of the sample for the fit; None: the basis was given.
        basis: digest of the basis; None: not fitted yet.
        explained_share: requested share of the variance; None: k was requested.
    """

    components: int | None
    fitted_on_images: int | None = None
    basis: str | None = None
    explained_share: float | None = None


@dataclass(frozen=True)
class StorageConfiguration(_Part):
    """How features are encoded.

    Attributes:
        dtype: int8 or float16.
        shard_images: rows per shard.
        zstd_level: compression level.
        error_floor: of the quantization steps, as a share of the features' root mean square; None for float16.
        represent: "half": features at half the resolution; "compact": components before the upsampler's last step;
            None: the features, "dense".
        converted_from: representation and data type of the store that this one was converted from; None: it was made
            of images.
        embedding: number of channels of the images' embeddings; None: there are none.
        guidance_quality: compact: JPEG quality of the guidance images; None: the last step needs none.
        steps: SHA-256 (hex) of quantization steps that were given; None: they were measured on the images, or there are
            none.
    """

    dtype: str
    shard_images: int
    zstd_level: int
    error_floor: float | None = None
    represent: Literal["half", "compact"] | None = None
    guidance_quality: int | None = None
    embedding: int | None = None
    converted_from: str | None = None
    steps: str | None = None


@dataclass(frozen=True)
class StoreConfiguration:
    """Everything that a store's features depend on.

    Attributes:
        source: the images.
        backbone: `Backbone.identity`, JSON types.
        geometry: how images are placed on the grid of the features.
        pca: the basis.
        upsampler: `Upsampler.identity`, JSON types.
        storage: how features are encoded.
    """

    source: SourceConfiguration
    backbone: Mapping[str, Any]
    geometry: GeometryConfiguration
    pca: PcaConfiguration
    upsampler: Mapping[str, Any]
    storage: StorageConfiguration

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the configuration as canonical JSON."""
        from densefeat.layout import configuration_sha256  # imports numpy, which options do without

        return configuration_sha256(self.to_dict())

    def with_basis(self, digest: str, components: int) -> "StoreConfiguration":
        """Return a copy with the digest of the basis, and its number of components."""
        return replace(self, pca=replace(self.pca, basis=digest, components=components))

    def with_fit(self, fit: Mapping[str, Any]) -> "StoreConfiguration":
        """Return a copy with the identity of the upsampler's fit to the images."""
        return replace(self, upsampler={**self.upsampler, FITTED: dict(fit)})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Convert to JSON types."""
        return {
            name: value.to_dict() if isinstance(value, _Part) else dict(value) for name, value in self.__dict__.items()
        }

    def of_rows(self) -> dict[str, dict[str, Any]]:
        """What rows of one store have in common, as JSON types: without the images themselves and the size of shards.

        How basis and steps came about is left out, too: fitted and measured, or given.
        """
        parts = self.to_dict()
        for part, names in _PROVENANCE.items():
            parts[part] = {name: value for name, value in parts[part].items() if name not in names}
        return parts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StoreConfiguration":
        """Invert `to_dict`.

        Raises:
            ValueError: not a configuration of a store; the message names the parts or fields.
        """
        if missing := [field.name for field in fields(cls) if not isinstance(values.get(field.name), Mapping)]:
            raise ValueError(f"the configuration has no {', '.join(missing)}")
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"the configuration has unknown parts {', '.join(unknown)}")
        parts: dict[str, Any] = dict(values)
        for name, kind in _PARTS.items():
            try:
                parts[name] = kind.from_dict(values[name])
            except ValueError as error:
                raise ValueError(f"configuration.{name}: {error}") from error
        return cls(**parts)


_PARTS: dict[str, type[_Part]] = {
    "source": SourceConfiguration,
    "geometry": GeometryConfiguration,
    "pca": PcaConfiguration,
    "storage": StorageConfiguration,
}


# Fields in which the rows of one store may differ.
_PROVENANCE = {
    "source": ("images", "limit", "rows", "keys_sha256"),
    "pca": ("fitted_on_images", "explained_share"),
    "storage": ("shard_images", "steps"),
}


def incompatibilities(stored: StoreConfiguration, asked: StoreConfiguration) -> list[str]:
    """Reasons why a job must not work on a store, one line each; empty if it may. All jobs use this rule.

    A fitted basis is not compared, nor a number of components that follows from a share of the variance, nor the fit of
    an upsampler, because fits on different machines can differ in a bit: later jobs use those in the store.

    Args:
        stored: configuration of the store.
        asked: configuration of the job, with a basis only if one was given.
    """
    pca = stored.pca
    if pca.fitted_on_images is not None:
        pca = replace(pca, basis=None)
    if asked.pca.explained_share is None:
        pca = replace(pca, explained_share=None)  # k was asked for: why the store has as many does not matter
    else:
        pca = replace(pca, components=asked.pca.components)
    upsampler = dict(stored.upsampler)
    if FITTED not in asked.upsampler:
        upsampler.pop(FITTED, None)
    stored = replace(stored, pca=pca, upsampler=upsampler)
    return differences(stored.to_dict(), asked.to_dict())


def differences(
    stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "", sides: tuple[str, str] = ("stored", "asked")
) -> list[str]:
    """Differences between two JSON objects, one line each: ``backbone.layer: stored 11, asked 9``.

    Args:
        stored: one of them.
        asked: the other.
        prefix: of all names.
        sides: what the two are called.
    """
    lines = []
    for name in sorted({*stored, *asked}):
        old, new = stored.get(name), asked.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.", sides)
        elif old != new:
            lines.append(f"{prefix}{name}: {sides[0]} {json.dumps(old)}, {sides[1]} {json.dumps(new)}")
    return lines


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
