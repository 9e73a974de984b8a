"""The features that are compared: stores, and configurations of the main job whose features are computed first."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from densefeat import layout
from densefeat.errors import DensefeatError
from densefeat.storage.objects import Objects
from densefeat.storage.parquet import read_parquet
from densefeat.storage.places import absolute_place
from densefeat.store import FeatureStore
from pipeline.errors import JobError
from pipeline.evaluate.data.side_options import SideOptions, parse_side
from pipeline.io.storage import temporary_folder
from pipeline.run.job import carry_out
from pipeline.run.planning.plan import make_plan
from pipeline.store.layout import stored_attributes
from schemas.configuration import StoreConfiguration
from schemas.options import UpsampleConfig

__all__ = ["PlannedSide", "Side", "keys_with_features", "open_sides"]

logger = logging.getLogger(__name__)

_COMPUTING = ("backbone", "upsample")  # stages of the main job that compute features


@dataclass(frozen=True, eq=False)
class Side:
    """Features that are compared with others.

    Attributes:
        name: in tables and pictures.
        store: their store.
        seconds_per_image: busy seconds of backbone and upsampler per image, from the ledger; None if it is unfinished,
            or made of another store.
        device: that they were computed on, from the ledger.
        first: number of components in use; None: all.
        weights: of the backbone, as passed to the main job, if the features were computed here.
    """

    name: str
    store: FeatureStore
    seconds_per_image: float | None = None
    device: str | None = None
    first: int | None = None
    weights: str | None = None

    @classmethod
    def of(cls, name: str, uri: str, first: int | None = None, weights: str | None = None) -> "Side":
        """Open a store.

        Raises:
            JobError: it has fewer components than ``first``.
            StoreError: there is none, or it is damaged.
        """
        store = FeatureStore(uri)
        if first is not None and not 1 <= first <= store.shape[0]:
            raise _too_few(name, first, store.shape[0])
        objects = Objects(uri)
        if not objects.exists(layout.MANIFEST):
            return cls(name, store, None, None, first, weights)
        records = read_parquet(objects.get(layout.MANIFEST)).to_pylist()
        by_stage = [dict(record["seconds"] or ()) for record in records]
        seconds = [stages[stage] for stages in by_stage for stage in _COMPUTING if stage in stages]
        rows = sum(record["rows_ok"] + record["rows_failed"] for record in records)
        devices = Counter(dict(record["made_by"] or ()).get("device", "") for record in records)
        per_image = sum(seconds) / rows if seconds else None
        return cls(name, store, per_image, devices.most_common(1)[0][0] or None, first, weights)

    def read(self, key: str) -> Tensor:
        """Features of an image: [k, H, W] float32."""
        return torch.from_numpy(self.store.read(key)[: self.first])

    @cached_property
    def components(self) -> npt.NDArray[np.float32]:
        """[k, C], orthonormal rows: the part of the basis that is in use."""
        return self.store.components[: self.first]

    @cached_property
    def _centre(self) -> tuple[Tensor, float]:
        """The mean of the channels in components [k], and the length of the rest of it."""
        mean, components = self.store.mean.astype(np.float64), self.components.astype(np.float64)
        inside = components @ mean
        rest = max(float(mean @ mean - inside @ inside), 0.0) ** 0.5
        return torch.from_numpy(inside.astype(np.float32)), rest

    def unit_channels(self, features: Tensor) -> Tensor:
        """Vectors of length 1 with the cosines of the reconstructed channels: [k, m, n] -> [k + 1, m, n].

        The channels of a pixel are componentsᵀ f + mean. The components are orthonormal, so that f + components · mean,
        and the length of the mean outside of their span, have the same products. No C channels are computed.
        """
        inside, rest = self._centre
        outside = features.new_full((1, *features.shape[1:]), rest)
        return F.normalize(torch.cat([features + inside[:, None, None], outside]), dim=0)

    def description(self) -> dict[str, Any]:
        """The side for report.json."""
        return {
            "name": self.name,
            "store": self.store.uri,
            "configuration_hash": self.store.attributes["configuration_hash"],
            "configuration": self.store.attributes["configuration"],
            "seconds_per_image": self.seconds_per_image,
            "device": self.device,
            "first": self.first,
        }


@dataclass(frozen=True, eq=False)
class PlannedSide:
    """A side before its features are computed.

    Attributes:
        name: in tables and pictures.
        weights: as for `Side`.
        configuration: of the store.
        keys: of the images; if the features are there, of those that have some.
    """

    name: str
    weights: str | None
    configuration: StoreConfiguration
    keys: Sequence[str]

    @classmethod
    def of_store(cls, side: SideOptions, store: FeatureStore) -> "PlannedSide":
        """A side whose features are there."""
        attributes = stored_attributes(store.uri, store.attributes)
        return cls(side.name, side.weights, attributes.configuration, keys_with_features(store))


def keys_with_features(store: FeatureStore) -> list[str]:
    """Keys of the rows with features, without those that another row has too."""
    keys = store.keys
    counts = Counter(keys)
    return [keys[row] for row in store.rows_with_features if counts[keys[row]] == 1]


@contextmanager
def open_sides(
    features: Sequence[str],
    images: str | None,
    stores: str | None,
    check: Callable[[Sequence[PlannedSide]], None] = lambda sides: None,
) -> Iterator[list[Side]]:
    """Open the features to compare; those of configurations are computed first, after all sides are checked.

    Args:
        features: values of --features.
        images: for configurations.
        stores: folder that keeps the stores of configurations; None: they are deleted with the context.
        check: called with all sides before features are computed; it may raise a JobError.

    Raises:
        JobError: two sides have one name, or the main job refuses a configuration.
        StoreError: there is no store, or it is damaged.
    """
    sides = [parse_side(text) for text in features]
    if len({side.name for side in sides}) < len(sides):
        raise JobError(f"--features: names must differ, got {', '.join(side.name for side in sides)}; set name=…")
    if images is None and any(side.store is None for side in sides):
        raise JobError("--features: configurations need --images, to compute their features")
    opened = {side.name: Side.of(side.name, side.store, side.first) for side in sides if side.store is not None}
    with ExitStack() as stack:
        folder = stores or str(stack.enter_context(temporary_folder("evaluate-")))
        configurations = {side.name: _configuration(side, str(images), folder) for side in sides if side.store is None}
        check(
            [
                _planned(side, configurations[side.name])
                if side.store is None
                else PlannedSide.of_store(side, opened[side.name].store)
                for side in sides
            ]
        )
        for side in sides:
            if side.store is None:
                store = _computed(side.name, configurations[side.name])
                opened[side.name] = Side.of(side.name, store, side.first, side.weights)
        yield [opened[side.name] for side in sides]


def _configuration(side: SideOptions, images: str, folder: str) -> UpsampleConfig:
    """Options of the main job for a side; the name of the store in ``folder`` follows from them."""
    digest = hashlib.sha256(repr((absolute_place(images), sorted(side.options.items()))).encode()).hexdigest()[:16]
    store = str(Path(folder) / digest) if "://" not in folder else f"{folder.rstrip('/')}/{digest}"
    try:
        config = UpsampleConfig(images=images, store=store, resume=True, **side.options)
    except ValueError as error:
        raise JobError(f"--features {side.name}: {error}") from error
    if side.first is not None and isinstance(config.components, int) and not 1 <= side.first <= config.components:
        raise _too_few(side.name, side.first, config.components)
    return config


def _planned(side: SideOptions, config: UpsampleConfig) -> PlannedSide:
    """Plan a configuration without doing any work; one whose store is finished is read from there."""
    try:
        if Objects(config.store).exists(layout.MANIFEST):
            return PlannedSide.of_store(side, FeatureStore(config.store))
        plan = make_plan(replace(config, dry_run=True))
    except DensefeatError as error:
        raise JobError(f"--features {side.name}: {error}") from error
    return PlannedSide(side.name, side.weights, plan.configuration, plan.references["key"].to_pylist())


def _computed(name: str, config: UpsampleConfig) -> str:
    """Compute the features of a configuration with the main job, unless they are there; returns their store."""
    logger.info("%s: computing features into %s", name, config.store)
    try:
        report = carry_out(make_plan(config), time.monotonic())
    except DensefeatError as error:
        raise JobError(f"--features {name}: {error}") from error
    if report.given_up:
        raise JobError(f"--features {name}: features could not be computed:\n{report.describe()}")
    return config.store


def _too_few(name: str, first: int, components: int) -> JobError:
    return JobError(f"--features {name}: first={first}, but the store has {components} components")
