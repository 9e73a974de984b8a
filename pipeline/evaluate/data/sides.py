"""The features that are compared: stores, and configurations of the main job whose features are computed first."""

import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
from pipeline.io.storage import temporary_folder
from pipeline.run.job import carry_out
from pipeline.run.planning.plan import make_plan
from schemas.options import UpsampleConfig

__all__ = ["Side", "SideOptions", "open_sides", "parse_side"]

logger = logging.getLogger(__name__)

_NOT_IN_A_SIDE = ("images", "store", "resume", "overwrite", "dry_run", "measure", "shards")
_COMPUTING = ("backbone", "upsample")  # stages of the main job that compute features


@dataclass(frozen=True)
class SideOptions:
    """What one value of --features asks for.

    Attributes:
        name: in tables and pictures.
        store: folder or URI of a store; None: features are computed with ``options``.
        options: of the main job.
        first: number of components to use; None: all.
    """

    name: str
    store: str | None
    options: Mapping[str, Any]
    first: int | None = None


@dataclass(frozen=True, eq=False)
class Side:
    """Features that are compared with others.

    Attributes:
        name: in tables and pictures.
        store: their store.
        seconds_per_image: busy seconds of backbone and upsampler per image, from the ledger; None if it is unfinished.
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
        seconds = sum(dict(record["seconds"] or ()).get(stage, 0.0) for record in records for stage in _COMPUTING)
        rows = sum(record["rows_ok"] + record["rows_failed"] for record in records)
        devices = Counter(dict(record["made_by"] or ()).get("device", "") for record in records)
        return cls(name, store, seconds / rows, devices.most_common(1)[0][0] or None, first, weights)

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


def parse_side(text: str) -> SideOptions:
    """Parse a value of --features.

    Raises:
        JobError: it names an unknown option, or a value does not fit its option.
    """
    parts = re.split(r",(?=[a-z_]+=)", text)
    if not all(re.match(r"[a-z_]+=", part) for part in parts):
        return SideOptions(text, text, {})
    pairs = [part.split("=", 1) for part in parts]
    named = dict(pairs)
    if repeated := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise JobError(f"--features {text}: {', '.join(repeated)} is there more than once")
    name, store = named.pop("name", None), named.pop("store", None)
    first = _typed(text, "first", named.pop("first"), int) if "first" in named else None
    if store is not None:
        if named:
            raise JobError(f"--features {text}: a store has its own options, leave out {', '.join(named)}")
        return SideOptions(name or text, store, {}, first)
    known = get_type_hints(UpsampleConfig)
    if unknown := [option for option in named if option not in known or option in _NOT_IN_A_SIDE]:
        allowed = ", ".join(["name", "store", "first", *sorted({*known} - {*_NOT_IN_A_SIDE})])
        raise JobError(f"--features {text}: unknown {', '.join(unknown)}; expected {allowed}")
    options = {option: _typed(text, option, value, known[option]) for option, value in named.items()}
    return SideOptions(name or text, None, options, first)


def _typed(side: str, option: str, value: str, hint: Any) -> Any:
    """A value of the option's type: int, float, bool, str, or a literal."""
    kinds = get_args(hint) or (hint,)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    if bool in kinds and value in ("true", "false"):
        return value == "true"
    if str in kinds or value in kinds or any(value in get_args(kind) for kind in kinds):
        return value
    choices = [choice for kind in (hint, *kinds) for choice in get_args(kind) if isinstance(choice, str)]
    expected = " or ".join(choices or (["true", "false"] if bool in kinds else ["a number"]))
    raise JobError(f"--features {side}: {option}={value}: expected {expected}")


@contextmanager
def open_sides(features: Sequence[str], images: str | None, stores: str | None) -> Iterator[list[Side]]:
    """Open the features to compare; those of configurations are computed first, after all sides are checked.

    Args:
        features: values of --features.
        images: for configurations.
        stores: folder that keeps the stores of configurations; None: they are deleted with the context.

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
        if len(configurations) > 1:
            for name, config in configurations.items():
                _check(name, config)
        for side in sides:
            if side.store is None:
                store = _computed(side.name, configurations[side.name])
                weights = side.options.get("weights", "pretrained")
                opened[side.name] = Side.of(side.name, store, side.first, weights)
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


def _check(name: str, config: UpsampleConfig) -> None:
    """Refuse a configuration before another one's features are computed; those in a finished store are not checked."""
    if Objects(config.store).exists(layout.MANIFEST):
        return
    try:
        make_plan(replace(config, dry_run=True))
    except DensefeatError as error:
        raise JobError(f"--features {name}: {error}") from error


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
