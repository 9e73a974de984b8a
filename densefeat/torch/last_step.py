"""The last step of upsampling, which readers of a compact store take: from stored components to features."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from densefeat.torch.bilateral import StageSettings, resize, upsample

__all__ = ["LastStep"]

_METHODS = ("bilinear", "jbu")


class LastStep(nn.Module):
    """From the stored components of images to their features, as the store's upsampler would have computed them.

    A compact store keeps components before the last step, and the image that guides it. Everything runs on the device
    of the arguments. In a training loop, move codes and guidance there, and take the step in batches::

        step = LastStep.of(store.attributes["compact"])
        features = step(components.to(device), guidance.to(device))

    Attributes:
        size: height and width of the features.
        method: ``"bilinear"``: bilinear interpolation. ``"jbu"``: training-free joint bilateral upsampling.
        stages: settings of the stages of ``"jbu"``, as for `densefeat.torch.bilateral.upsample`.
    """

    def __init__(self, size: tuple[int, int], method: str, stages: Sequence[StageSettings] = ()) -> None:
        if (method == "jbu") != bool(stages):
            raise ValueError(f"stages: got {len(stages)} for the step {method!r}, only 'jbu' has any, and needs them")
        super().__init__()
        self.size, self.method, self.stages = size, method, tuple(stages)

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "LastStep":
        """Build the step from the attribute ``compact`` of a store.

        Raises:
            ValueError: the description is damaged, or of a step that this version does not know.
        """
        try:
            (height, width), step = description["size"], dict(description["last_step"])
            method = step.pop("name")
            if method not in _METHODS:
                raise ValueError(f"the step {method!r} is unknown to this version of densefeat: upgrade it")
            settings = [] if method == "bilinear" else _stages(step)
            if step:
                raise _unknown(step)
            return cls((int(height), int(width)), method, settings)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the attribute compact is damaged: {type(error).__name__}: {error}") from error

    @property
    def guided(self) -> bool:
        """Whether it needs guidance images."""
        return self.method != "bilinear"

    def forward(self, components: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Take the step.

        Args:
            components: [B, k, h, w], floating: stored codes times the store's step.
            guidance: [B, 3, H, W] uint8 RGB, on the same device; None if it is not ``guided``.

        Returns:
            [B, k, *size], dtype of ``components``.

        Raises:
            ValueError: it needs guidance, and there is none.
        """
        if not self.guided:
            return resize(components, self.size)
        if guidance is None:
            raise ValueError(f"guidance: got None, the step {self.method!r} needs images [B, 3, H, W]")
        return upsample(components, guidance, self.size, self.stages)

    def on_arrays(
        self, components: npt.NDArray[np.float32], guidance: npt.NDArray[np.uint8] | None
    ) -> npt.NDArray[np.float32]:
        """Take the step for one image on the CPU: [k, h, w] float32 and [H, W, 3] uint8 → [k, *size] float32."""
        with torch.inference_mode():
            images = None if guidance is None else torch.tensor(guidance).permute(2, 0, 1)[None]
            high: npt.NDArray[np.float32] = self(torch.from_numpy(components)[None], images)[0].contiguous().numpy()
        return high

    def extra_repr(self) -> str:
        """Size, method and settings."""
        return f"size={self.size}, method={self.method}, stages={self.stages}"


def _taken(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.pop(name) for name in StageSettings._fields}


def _stages(step: dict[str, Any]) -> list[StageSettings]:
    """Take the settings of the stages out of a step: a list, or those of all stages in the step itself."""
    if "stages" not in step:
        return [_stage(_taken(step))]
    stages = step.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise TypeError(f"stages are {stages!r}")
    return [_stage(dict(stage)) for stage in stages]


def _stage(settings: dict[str, Any]) -> StageSettings:
    radius, sigma_spatial, sigma_range = _taken(settings).values()
    if settings:
        raise _unknown(settings)
    stage = StageSettings(int(radius), float(sigma_spatial), float(sigma_range))
    if stage.radius < 1 or not 0 < min(stage[1:]) <= max(stage[1:]) < math.inf:
        raise ValueError(f"the attribute compact is damaged: a stage has {stage}")
    return stage


def _unknown(settings: Mapping[str, Any]) -> ValueError:
    return ValueError(f"its step has the unknown settings {', '.join(sorted(settings))}: upgrade densefeat")
