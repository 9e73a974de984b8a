"""The provenance of an upsampler's weights: the metadata of their .safetensors files, written, read and compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_metadata
from schemas.configuration import differences

__all__ = ["Provenance", "backbone_name", "check_pairing"]

_FORMAT = "densefeat-upsampler-1"
# Earlier files of jobs/fit_pooling.py have one JSON document under this key.
_POOLING_KEY, _POOLING_FORMAT = "densefeat", 1


@dataclass(frozen=True)
class Provenance:
    """Which upsampler and backbones weights are for. The metadata holds ``format``, and the fields by their names.

    Attributes:
        upsampler: name of the upsampler; None if the file does not say.
        backbones: `Backbone.identity` of each backbone that they were made with, as JSON has it; empty if a file does
            not say.
        details: all other metadata, by name. With ``final`` "off" the weights serve every backbone, else those in
            ``backbones``, at cells of ``patch`` pixels if that is given.
    """

    upsampler: str | None
    backbones: tuple[dict[str, Any], ...]
    details: Mapping[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a .safetensors file."""
        named = {} if self.upsampler is None else {"upsampler": self.upsampler}
        made_with = {"backbones": json.dumps(self.backbones)} if self.backbones else {}
        return {"format": _FORMAT, **named, **made_with, **self.details}

    def safetensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """A .safetensors file of weights with this metadata: equal weights and metadata give equal bytes.

        Args:
            tensors: contiguous, by name.
        """
        written = save(dict(tensors), self.to_metadata())
        end = 8 + int.from_bytes(written[:8], "little")
        header = json.loads(written[8:end])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors' own order is random
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + written[end:]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], uri: str) -> "Provenance | None":
        """Read the metadata of a .safetensors file.

        Args:
            metadata: as `read_metadata` returns it.
            uri: of the file, for errors.

        Returns:
            None for a file that densefeat did not write; its metadata may mean anything.

        Raises:
            JobError: the metadata is damaged, or of a later version.
        """
        if _POOLING_KEY in metadata:
            metadata = _pooling_metadata(metadata[_POOLING_KEY], uri)
        if metadata.get("format") != _FORMAT:
            return None
        details = {name: text for name, text in metadata.items() if name not in ("format", "upsampler", "backbones")}
        backbones = _identities(metadata["backbones"], uri) if "backbones" in metadata else ()
        return cls(metadata.get("upsampler"), backbones, details)


def backbone_name(identity: Mapping[str, object]) -> str:
    """A backbone for a person, by its identity: ``resnet18 at layer 2 (weights 0a1b2c3d4e5f…)``."""
    return f"{identity['name']} at layer {identity['layer']} (weights {str(identity['weights'])[:12]}…)"


def check_pairing(uri: str, upsampler: str, backbone: Backbone) -> None:
    """Refuse weights for another upsampler or backbone. Weights without `Provenance` (published ones) pass.

    Args:
        uri: of the weights.
        upsampler: name of the job's upsampler.
        backbone: of the job.

    Raises:
        JobError: the weights are for another upsampler, backbone, layer or patch size (the message names both sides);
            or the file cannot be read, or its metadata is damaged.
    """
    known = Provenance.from_metadata(read_metadata(uri), uri)
    if known is None:
        return
    if known.upsampler not in (None, upsampler):
        raise JobError(
            f"weights {uri} are of the upsampler {known.upsampler}, asked is {upsampler}: give --upsampler "
            f"{known.upsampler}"
        )
    if known.details.get("final") == "off" or not known.backbones:
        return
    asked = backbone.identity()
    different = [] if asked in known.backbones else differences(known.backbones[0], asked)
    if (patch := known.details.get("patch", str(backbone.reduction))) != str(backbone.reduction):
        different.append(f"pixels of a cell: stored {patch}, asked {backbone.reduction}")
    if different:
        raise JobError(
            f"{upsampler} weights {uri} are for {' and '.join(map(backbone_name, known.backbones))}, the backbone is "
            f"{backbone_name(asked)}: {'; '.join(line.replace('stored', 'weights') for line in different)}. Choose "
            "weights trained for this backbone and layer, or train some with jobs/train_upsampler.py"
        )


def _identities(text: str, uri: str) -> tuple[dict[str, Any], ...]:
    """The identities of backbones in the metadata, at least one."""
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
    """The metadata of today from the document in an earlier file of jobs/fit_pooling.py."""
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
