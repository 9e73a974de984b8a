"""Upsamplers that are fitted to images of the dataset before they can upsample: the interface of such a fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.features.checkpoints import state_digest

__all__ = ["Fitting", "UpsamplerFit", "fitted_on"]


@dataclass(frozen=True, eq=False)
class UpsamplerFit:
    """What an upsampler was fitted to be, for one basis: part of the store.

    Attributes:
        settings: chosen settings, JSON types.
        arrays: name -> float32 array; the first dimension is that of the components.
        described: one line for the log.
    """

    settings: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[np.float32]]
    described: str = ""

    @cached_property
    def digest(self) -> str:
        """Digest of the arrays; computed once, because workers compare it for each batch."""
        return state_digest({name: torch.from_numpy(np.array(array, "<f4")) for name, array in self.arrays.items()})

    def identity(self) -> dict[str, Any]:
        """All that the features depend on, JSON-serialisable, for the configuration."""
        return {**self.settings, "digest": self.digest}


class Fitting(Protocol):
    """How an upsampler is fitted to images of the dataset: samples of images, then trials on them, in any order.

    Attributes:
        images: number of images to fit on; fewer will do if the dataset has fewer.
    """

    images: int

    def sample(self, images: Tensor, mean: Tensor, components: Tensor) -> Any:
        """What the fit must know of images [B, 3, H, W] uint8, on the backbone's device; None if they cannot be used.

        Returns:
            A value to pickle, with the methods ``merged(other)`` and ``first(count)``, and a length.
        """

    def trial(self, sample: Any, trial: Any, device: torch.device) -> Any:
        """Run a trial on a device."""

    def fit(self, sample: Any, run: Callable[[Sequence[Any]], list[Any]]) -> UpsamplerFit:
        """Choose settings.

        Args:
            sample: of all images.
            run: runs trials, and returns their results in the same order.
        """

    def usual(self, components: int) -> UpsamplerFit:
        """A fit without images, to estimate what a job will cost."""


def fitted_on(device: torch.device, fitting: Fitting, sample: Any) -> UpsamplerFit:
    """Fit to a sample, with one trial after another on a device."""
    return fitting.fit(sample, lambda trials: [fitting.trial(sample, trial, device) for trial in trials])
