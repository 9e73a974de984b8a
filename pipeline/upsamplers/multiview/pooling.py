"""The weights of the multiview upsampler: a model of how a backbone pools pixels into features.

``jobs/fit_pooling.py`` writes it as one .safetensors file: the positional bias as the only tensor, all else as JSON in
the metadata.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import read_metadata, read_state_dict, state_digest
from pipeline.features.provenance import Provenance, backbone_name
from pipeline.upsamplers.multiview.views import ViewOrder
from schemas.configuration import differences

__all__ = ["FitSettings", "Origin", "PoolingModel"]

_UPSAMPLER = "multiview"
_MAKE_ONE = "Omit the option, so that the job fits one to its images, or fit one with jobs/fit_pooling.py."


@dataclass(frozen=True)
class FitSettings:
    """How the solver fits an image.

    Attributes:
        sigma_px: standard deviation of the Gaussian that models the backbone's pooling, in pixels of the image.
        views: number of views per image.
        stride_px: side of a cell of the solver's grid, in pixels of the image.
        regularisation: λ of the image-guided Laplacian. It is tuned for the number of views it was chosen with; the
            best value grows slowly with that number, and is not adjusted.
        iterations: maximum number of conjugate-gradient steps.
        colour_sigma: colour scale of the Laplacian's weights, as a distance in RGB (0 … 1).
        order: which views come first; models fitted before there was a choice have the sequence's order.
        smoothing: strength of the smoothing of the solution within the image's regions; models fitted before there was
            one have none.
    """

    sigma_px: float
    views: int
    stride_px: int
    regularisation: float
    iterations: int
    colour_sigma: float = 0.05  # held-out error: .221 at .02 and .05, .223 at .1, .230 unguided (ViT-S/14)
    order: ViewOrder = "sequence"
    smoothing: float = 0.0

    def identity(self) -> dict[str, Any]:
        """All settings; those added later only if they are not the defaults, so that earlier configurations match."""
        later = {"order": "sequence", "smoothing": 0.0}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True)
class Origin:
    """The backbone and images that a pooling model was fitted on.

    Attributes:
        backbone: `Backbone.identity`.
        size: (H, W) of the images in pixels.
        grid: (h, w) of the features.
        account: record of the fit, informative only: images, held-out errors by setting, versions.
    """

    backbone: dict[str, Any]
    size: tuple[int, int]
    grid: tuple[int, int]
    account: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PoolingModel:
    """A backbone modelled as a linear operator: Gaussian pooling of the view, plus a positional bias.

    Attributes:
        bias: [C, h, w] float32, what the backbone adds at each position regardless of the image; zero mean over
            positions.
        settings: the solver's settings.
        origin: the backbone and sizes it was fitted on.
    """

    bias: Tensor
    settings: FitSettings
    origin: Origin

    @property
    def digest(self) -> str:
        """Digest of the bias; settings are compared directly."""
        return state_digest({"bias": self.bias})

    def check(self, backbone: Backbone, uri: str) -> None:
        """Check that the backbone and layer are those it was fitted on; the image size may differ.

        Raises:
            JobError: they differ; the message names both.
        """
        own, other = backbone.identity(), self.origin.backbone
        if own == other:
            return
        raise JobError(
            f"Weights {uri!r} were fitted on {backbone_name(other)}, this job has {backbone.label}: "
            f"{'; '.join(differences(other, own))}. Omit --upsampler-weights, so that the job fits a model to its "
            "images, or fit another one with jobs/fit_pooling.py."
        )

    def bias_on(self, grid: tuple[int, int]) -> Tensor:
        """The bias on the grid of another image size: [C, h, w], interpolated, with zero mean over positions."""
        if tuple(self.bias.shape[1:]) == grid:
            return self.bias
        bias = F.interpolate(self.bias[None], grid, mode="bilinear", align_corners=False)[0]
        return bias - bias.mean((1, 2), keepdim=True)

    def to_bytes(self) -> bytes:
        """Serialise to the bytes of a .safetensors file."""
        origin = self.origin
        details = {"settings": asdict(self.settings), "size": origin.size, "grid": origin.grid}
        provenance = Provenance(
            _UPSAMPLER,
            (origin.backbone,),
            {name: json.dumps(value) for name, value in {**details, "account": origin.account}.items()},
        )
        return provenance.safetensors({"bias": self.bias.contiguous().cpu().float()})

    @classmethod
    def read(cls, uri: str) -> "PoolingModel":
        """Read a file, local or remote.

        Raises:
            JobError: the file is missing, damaged, or not a pooling model.
        """
        if (suffix := PurePosixPath(uri).suffix.lower()) != ".safetensors":
            raise JobError(f"Weights {uri!r}: got the suffix {suffix!r}, expected a .safetensors file. {_MAKE_ONE}")
        try:
            metadata = read_metadata(uri)
            provenance = Provenance.from_metadata(metadata, uri)
            state = {} if provenance is None else read_state_dict(uri)
        except JobError as error:
            raise JobError(f"{str(error).rstrip('.')}. {_MAKE_ONE}") from error
        if provenance is None or provenance.upsampler != _UPSAMPLER:
            named = metadata.get("upsampler")
            trained = "" if named is None else f", they belong to the upsampler {named}"
            raise JobError(f"Weights {uri!r} are not a pooling model{trained}. {_MAKE_ONE}")
        try:
            return cls._from_parts(state["bias"], provenance)
        except (KeyError, TypeError, ValueError) as error:
            raise JobError(
                f"Weights {uri!r}: got {type(error).__name__}: {error}, expected a file written by "
                f"jobs/fit_pooling.py. {_MAKE_ONE}"
            ) from error

    @classmethod
    def _from_parts(cls, bias: Tensor, provenance: Provenance) -> "PoolingModel":
        names = ("settings", "size", "grid", "account")
        details = {name: json.loads(provenance.details[name]) for name in names}
        (backbone,) = provenance.backbones
        origin = Origin(backbone, tuple(details["size"]), tuple(details["grid"]), details["account"])
        if bias.shape[1:] != origin.grid:
            raise ValueError(f"its bias is {list(bias.shape)} for a grid of {origin.grid}")
        return cls(bias, FitSettings(**details["settings"]), origin)
