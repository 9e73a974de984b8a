"""What the multiview solver needs to know of a backbone: how it pools, its positional bias, and how hard to fit.

One .safetensors file: the bias, and everything else as JSON in its header. Made by ``jobs/fit_downsampler.py``.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from densefeat.storage.objects import Objects
from densefeat.storage.places import split_place
from pipeline.errors import JobError
from pipeline.features.backbone import Backbone
from pipeline.features.checkpoints import state_digest
from schemas.configuration import differences

__all__ = ["Downsampler", "FitSettings", "Origin"]

_FORMAT = 1
_KEY = "densefeat"


@dataclass(frozen=True)
class FitSettings:
    """How the solver fits an image.

    Attributes:
        sigma_px: of the Gaussian that the backbone is taken to pool with, in pixels of the image.
        views: of each image.
        stride_px: pixels of the image in a cell of the solver's grid, along each axis.
        regularisation: λ of the image-guided Laplacian. It suits the number of views it was chosen with; the best one
            grows slowly with that, and is not adjusted.
        iterations: most steps of conjugate gradient.
        colour_sigma: of the Laplacian's weights: distance in RGB, 0 … 1.
    """

    sigma_px: float
    views: int
    stride_px: int
    regularisation: float
    iterations: int
    colour_sigma: float = 0.05  # held-out views hardly tell: .221 at .02 and .05, .223 at .1, .230 unguided (ViT-S/14)


@dataclass(frozen=True)
class Origin:
    """What the downsampler was fitted on.

    Attributes:
        backbone: `Backbone.identity`.
        size: (H, W) of the images in pixels.
        grid: (h, w) of the features.
        account: of the fit, for people: images, held-out errors by setting, versions.
    """

    backbone: dict[str, Any]
    size: tuple[int, int]
    grid: tuple[int, int]
    account: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Downsampler:
    """A backbone, seen as a view's pooling.

    Attributes:
        bias: [C, h, w] float32: what the backbone adds to the features at each position whatever the image shows, the
            mean over positions being zero.
        settings: for the solver.
        origin: what it is for.
    """

    bias: Tensor
    settings: FitSettings
    origin: Origin

    @property
    def digest(self) -> str:
        """Of the bias; the settings can be read themselves."""
        return state_digest({"bias": self.bias})

    def check(self, backbone: Backbone, uri: str) -> None:
        """Refuse a backbone, layer or image size that it was not fitted on.

        Raises:
            JobError: naming both.
        """
        origin = self.origin
        own = json.loads(json.dumps({**backbone.identity(), "size": backbone.size, "grid": backbone.grid}))
        other = json.loads(json.dumps({**origin.backbone, "size": origin.size, "grid": origin.grid}))
        if own == other:
            return
        size, others = "×".join(map(str, backbone.size)), "×".join(map(str, origin.size))
        raise JobError(
            f"Weights {uri!r} were fitted on {origin.backbone.get('name')} at layer {origin.backbone.get('layer')} and "
            f"{others} pixels, this job has {backbone.name} at layer {backbone.layer} and {size} pixels: "
            f"{'; '.join(differences(other, own))}. Fit these with jobs/fit_downsampler.py."
        )

    def to_bytes(self) -> bytes:
        """The .safetensors file."""
        header = {"format": _FORMAT, "settings": asdict(self.settings), "origin": asdict(self.origin)}
        return save({"bias": self.bias.contiguous().cpu().float()}, {_KEY: json.dumps(header)})

    @classmethod
    def read(cls, uri: str) -> "Downsampler":
        """Read a file, local or remote.

        Raises:
            JobError: it is not there, or is not such a file.
        """
        try:
            folder, name = split_place(uri)
            data = Objects(folder).get(name)
            header = _header(data, uri)
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']}, this version reads {_FORMAT}")
            origin = header["origin"]
            origin = Origin(origin["backbone"], tuple(origin["size"]), tuple(origin["grid"]), origin["account"])
            bias = load(data)["bias"]
            if bias.shape[1:] != origin.grid:
                raise ValueError(f"its bias is {list(bias.shape)} for a grid of {origin.grid}")
            return cls(bias, FitSettings(**header["settings"]), origin)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise JobError(
                f"Weights {uri!r}: got {type(error).__name__}: {error}, expected a file that jobs/fit_downsampler.py "
                "made. Make one for this backbone and size."
            ) from error


def _header(data: bytes, uri: str) -> dict[str, Any]:
    """Ours, in the header of a .safetensors file: its length in 8 bytes, then JSON.

    Raises:
        JobError: the file is something else.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (AttributeError, ValueError):  # no JSON, or other JSON
        metadata = {}
    if _KEY not in metadata:
        trained = f", they are of the upsampler {metadata['upsampler']}" if "upsampler" in metadata else ""
        raise JobError(
            f"Weights {uri!r} are no downsampler{trained}: make one for this backbone and size with "
            "jobs/fit_downsampler.py"
        )
    header: dict[str, Any] = json.loads(metadata[_KEY])
    return header
