"""Weights of an upsampler say what they are for: the metadata that training writes, compared with what is asked."""

import json
from collections.abc import Mapping

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_metadata
from schemas.configuration import differences

__all__ = ["FORMAT", "backbone_name", "check_pairing"]

FORMAT = "densefeat-upsampler-1"  # what jobs/train_upsampler.py writes


def backbone_name(identity: Mapping[str, object]) -> str:
    """A backbone for a person, by its identity: ``resnet18 at layer 2 (weights 0a1b2c3d4e5f…)``."""
    return f"{identity['name']} at layer {identity['layer']} (weights {str(identity['weights'])[:12]}…)"


def check_pairing(uri: str, upsampler: str, backbone: Backbone) -> None:
    """Refuse weights that say that they are for something else. Weights that say nothing (published ones) pass.

    Args:
        uri: of the weights. Metadata whose ``format`` is not `FORMAT` is somebody else's and says nothing. In ours,
            ``upsampler`` names what they are of; where ``final`` is ``off`` they serve every backbone, else those in
            ``backbones`` (JSON: `Backbone.identity` of each), at cells of ``patch`` pixels if that is there.
        upsampler: the one asked for.
        backbone: whose features it is to upsample.

    Raises:
        JobError: they are, and both sides are named; or the file cannot be read, or its metadata is damaged.
    """
    metadata = read_metadata(uri)
    if metadata.get("format") != FORMAT:
        return
    trained = metadata.get("upsampler", upsampler)
    if trained != upsampler:
        raise JobError(
            f"weights {uri} are of the upsampler {trained}, asked is {upsampler}: give --upsampler {trained}"
        )
    if metadata.get("final") == "off" or "backbones" not in metadata:
        return
    made_for, names = _made_for(uri, metadata["backbones"])
    asked = json.loads(json.dumps(backbone.identity()))
    different = [] if asked in made_for else differences(made_for[0], asked)
    if (patch := metadata.get("patch", str(backbone.reduction))) != str(backbone.reduction):
        different.append(f"pixels of a cell: stored {patch}, asked {backbone.reduction}")
    if different:
        raise JobError(
            f"{upsampler} weights {uri} are for {' and '.join(names)}, the backbone is "
            f"{backbone_name(asked)}: {'; '.join(line.replace('stored', 'weights') for line in different)}. Choose "
            "weights trained for this backbone and layer, or train some with jobs/train_upsampler.py"
        )


def _made_for(uri: str, backbones: str) -> tuple[list[dict[str, object]], list[str]]:
    """Identities in the metadata, at least one, and their names."""
    try:
        made_for = json.loads(backbones)
        names = [backbone_name(identity) for identity in made_for]
        if not names:
            raise ValueError("there is none")
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"weights {uri}: got the backbones {backbones[:80]!r} in its metadata ({type(error).__name__}: {error}), "
            "expected JSON with their identities: the file is damaged, fetch it again"
        ) from error
    return made_for, names
