"""The attributes of a store: what made it, readable by a person, and a hash of it for the machine.

``configuration`` holds everything that the features depend on and nothing else: two stores with the same hash hold the
same features (up to floating-point differences between devices).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from densefeat.layout import ATTRIBUTES_KEY, FORMAT_VERSION


def configuration_hash(configuration: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the configuration as canonical JSON."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations, a line each: ``backbone.layer: stored 11, asked 9``."""
    lines = []
    for name in sorted({*stored, *asked}):
        old, new = stored.get(name), asked.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: stored {json.dumps(old)}, asked {json.dumps(new)}")
    return lines


def incompatibilities(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Why a job must not work on a store, a line each; none if it may: the one rule wherever two jobs or runs meet.

    What was asked for is compared. What came of it is not: the basis that was fitted here or there can differ in a bit,
    and whoever comes later takes the one that is in the store.

    Args:
        stored: the store's configuration.
        asked: the job's, with ``pca.basis`` only if it was given one.
    """
    stored = {**stored, "pca": dict(stored.get("pca", {}))}
    if "fitted_on_images" in stored["pca"]:
        stored["pca"].pop("basis", None)
    return differences(stored, json.loads(json.dumps(asked)))


@dataclass(frozen=True)
class StoreAttributes:
    """Attributes of the root group.

    Attributes:
        configuration: what the features depend on, resolved: source, backbone, geometry, pca, upsampler, storage.
        versions: of the software that set the store up.
        class_names: of the labels in the index, empty without labels.
        explained_variance: share of the low-resolution features' variance that the k components keep, 0 … 1.
        step_sha256: of the quantization steps (hex), None for float16.
        setup_complete: False from the moment the store is claimed until arrays and index are written.
        format_version: of the layout.
    """

    configuration: dict[str, Any]
    versions: dict[str, str]
    class_names: tuple[str, ...] = ()
    explained_variance: float | None = None
    step_sha256: str | None = None
    setup_complete: bool = False
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def hash(self) -> str:
        """The configuration hash."""
        return configuration_hash(self.configuration)

    def completed(self) -> "StoreAttributes":
        """The same, with setup complete."""
        return replace(self, setup_complete=True)

    def to_dict(self) -> dict[str, Any]:
        """As the group's ``attributes``."""
        own = {name: value for name, value in self.__dict__.items() if name != "class_names"}
        return {ATTRIBUTES_KEY: {**own, "class_names": list(self.class_names), "configuration_hash": self.hash}}

    @classmethod
    def from_dict(cls, own: Mapping[str, Any]) -> "StoreAttributes":
        """Read what ``densefeat.store.read_attributes`` returns."""
        fields = {name: value for name, value in own.items() if name != "configuration_hash"}
        return cls(**{**fields, "class_names": tuple(fields["class_names"])})
