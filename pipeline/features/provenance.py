"""Provenance of an upsampler's weights: write, read and compare the metadata of their .safetensors files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_metadata
from pipeline.features.layers import identity_label
from schemas.configuration import differences

__all__ = ["Provenance", "backbone_name", "check_pairing"]

_FORMAT = "densefeat-upsampler-1"
# Older files from jobs/fit_pooling.py have a single JSON document under this key.
_POOLING_KEY, _POOLING_FORMAT = "densefeat", 1


@dataclass(frozen=True)
class Provenance:
    """The upsampler and backbones that weights are for. The metadata holds ``format``, and the fields by name.

    Attributes:
        upsampler: name of the upsampler; None if the file does not record it.
        backbones: `Backbone.identity` of each backbone used in training, as parsed from JSON; empty if the file does
            not record them.
        details: all other metadata, by name. With ``final`` "off" the weights work with every backbone, otherwise only
            with ``backbones``, at cells of ``patch`` pixels if that is given.
    """

    upsampler: str | None
    backbones: tuple[dict[str, Any], ...]
    details: Mapping[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Serialise to the metadata of a .safetensors file."""
        named = {} if self.upsampler is None else {"upsampler": self.upsampler}
        made_with = {"backbones": json.dumps(self.backbones)} if self.backbones else {}
        return {"format": _FORMAT, **named, **made_with, **self.details}

    def safetensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Serialise weights with this metadata to a .safetensors file; equal inputs give equal bytes.

        Args:
            tensors: contiguous tensors by name.
        """
        written = save(dict(tensors), self.to_metadata())
        end = 8 + int.from_bytes(written[:8], "little")
        header = json.loads(written[8:end])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes it in random order
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + written[end:]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], uri: str) -> "Provenance | None":
        """Read the metadata of a .safetensors file.

        Args:
            metadata: as returned by `read_metadata`.
            uri: URI of the file, for errors.

        Returns:
            The provenance; None for a file not written by densefeat, whose metadata is undefined.

        Raises:
            JobError: the metadata is damaged or of a later version.
        """
        if _POOLING_KEY in metadata:
            metadata = _pooling_metadata(metadata[_POOLING_KEY], uri)
        if metadata.get("format") != _FORMAT:
            return None
        details = {name: text for name, text in metadata.items() if name not in ("format", "upsampler", "backbones")}
        backbones = _identities(metadata["backbones"], uri) if "backbones" in metadata else ()
        return cls(metadata.get("upsampler"), backbones, details)


def backbone_name(identity: Mapping[str, Any]) -> str:
    """Human-readable name of a backbone, from its identity: ``resnet18 at layer 2 (weights 0a1b2c3d4e5f…)``."""
    return f"{identity['name']} at {identity_label(identity)} (weights {str(identity['weights'])[:12]}…)"


def check_pairing(uri: str, upsampler: str, backbone: Backbone) -> None:
    """Check that weights are for this upsampler and backbone. Weights without `Provenance` (published ones) pass.

    Args:
        uri: URI of the weights.
        upsampler: name of the job's upsampler.
        backbone: the job's backbone.

    Raises:
        JobError: the weights are for another upsampler, backbone, layer or patch size (the message names both sides);
            the file cannot be read; or its metadata is damaged.
    """
    known = Provenance.from_metadata(read_metadata(uri), uri)
    if known is None:
        return
    if known.upsampler not in (None, upsampler):
        raise JobError(
            f"weights {uri} are for the upsampler {known.upsampler}, but this job uses {upsampler}: pass --upsampler "
            f"{known.upsampler}"
        )
    if known.details.get("final") == "off" or not known.backbones:
        return
    asked = backbone.identity()
    different = [] if asked in known.backbones else differences(known.backbones[0], asked)
    if (patch := known.details.get("patch", str(backbone.reduction))) != str(backbone.reduction):
        different.append(f"pixels per cell: stored {patch}, asked {backbone.reduction}")
    if different:
        raise JobError(
            f"{upsampler} weights {uri} are for {' and '.join(map(backbone_name, known.backbones))}, the backbone is "
            f"{backbone_name(asked)}: {'; '.join(line.replace('stored', 'weights') for line in different)}. Choose "
            "weights trained for this backbone and layer, or train some with jobs/train_upsampler.py"
        )


def _identities(text: str, uri: str) -> tuple[dict[str, Any], ...]:
    """Parse the backbones' identities in the metadata; at least one."""
    try:
        identities = json.loads(text)
        for identity in identities:
            backbone_name(identity)
        if not identities:
            raise ValueError("the list is empty")
        return tuple(identities)
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"weights {uri}: got the backbones {text[:80]!r} in its metadata ({type(error).__name__}: {error}), "
            "expected JSON with their identities: the file is damaged, fetch it again"
        ) from error


def _pooling_metadata(text: str, uri: str) -> dict[str, str]:
    """Convert the document in an older file from jobs/fit_pooling.py to current metadata."""
    try:
        document = json.loads(text)
        if document["format"] != _POOLING_FORMAT:
            raise ValueError(f"its format is {document['format']}, this version reads {_POOLING_FORMAT}")
        origin = document["origin"]
        details = {"settings": document["settings"], **{name: origin[name] for name in ("size", "grid", "account")}}
        named = {"format": _FORMAT, "upsampler": "multiview", "backbones": json.dumps([origin["backbone"]])}
        return {**named, **{name: json.dumps(value) for name, value in details.items()}}
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"weights {uri}: cannot read the metadata ({type(error).__name__}: {error}): the file is damaged or of "
            "another version"
        ) from error
