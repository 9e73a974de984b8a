"""The images that all sides have, and how they are split."""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from pipeline.errors import JobError
from pipeline.evaluate.data.grid import Grid
from pipeline.evaluate.data.sides import Side, keys_with_features
from schemas.index import OK, PENDING

__all__ = ["Comparison", "Split", "common_keys", "counted", "split", "spread"]

_TRAIN, _VAL = ("train", "training"), ("val", "validation", "test")
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """Keys of the images to train on and to evaluate on, and how they were chosen."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    described: str


@dataclass(eq=False)
class Comparison:
    """The sides, and their images.

    Attributes:
        sides: the first is the baseline.
        notes: what was left out and why, for the report; tasks add theirs.
    """

    sides: Sequence[Side]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys of the images with features on every side, in the order of the first.

        Raises:
            JobError: there is none.
        """
        found: list[list[str]] = []
        for side in self.sides:
            if without := _without_features(side):
                self.notes.append(f"{side.name}: rows without features: {without}")
            if repeated := sum(count for count in Counter(side.store.keys).values() if count > 1):
                self.notes.append(f"{side.name}: {repeated} rows share keys with other rows: left out")
            found.append(keys_with_features(side.store))
        common = common_keys({side.name: keys for side, keys in zip(self.sides, found, strict=True)})
        if left := len({key for keys in found for key in keys}) - len(common):
            self.notes.append(f"{counted(left, 'image')} left out: no features on some side")
        return common

    def grid(self, key: str) -> Grid:
        """The grid of an image.

        Raises:
            JobError: the sides do not see the same image.
        """
        try:
            return Grid.common([side.store.geometry(key) for side in self.sides])
        except ValueError as error:
            raise JobError(f"{key} cannot be compared: {error}") from error

    def features(self, side: Side, key: str, grid: Grid) -> Tensor:
        """Features of a side on the grid of an image: [k, m, n] float32."""
        return grid.features(side.read(key), side.store.geometry(key))

    def pixels(self, side: Side, key: str, grid: Grid) -> Tensor:
        """Features of a side at the points of an image's grid: [m·n, k] float32."""
        return self.features(side, key, grid).flatten(1).T

    def left_out(self, reasons: dict[str, str], what: str, unit: str = "image") -> None:
        """Note images, or other units, that were left out: key -> reason."""
        if reasons:
            shown = "; ".join(f"{key}: {reason}" for key, reason in list(reasons.items())[:_SHOWN])
            more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            self.notes.append(f"{counted(len(reasons), unit)} left out: {what} ({shown}{more})")


def common_keys(of_sides: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Keys that all sides have, in the order of the first.

    Raises:
        JobError: there is none.
    """
    first, *others = (dict.fromkeys(keys) for keys in of_sides.values())
    common = tuple(key for key in first if all(key in other for other in others))
    if not common:
        examples = ", ".join(f"{name}: {next(iter(keys), 'none')!r}" for name, keys in of_sides.items())
        raise JobError(f"--features: no image has features on every side; keys look like {examples}")
    return common


def counted(count: int, unit: str) -> str:
    """For example "1 image", "2 images"."""
    return f"{count} {unit}" + ("" if count == 1 else "s")


def _without_features(side: Side) -> str:
    """How many rows of a store have no features, by status; empty if all have."""
    found = {one["values"]: one["counts"] for one in side.store.lookup["status"].value_counts().to_pylist()}
    return ", ".join(
        f"{count} {'not computed yet' if status == PENDING else status}"
        for status, count in found.items()
        if status != OK
    )


def split(keys: Sequence[str], train: str | None, val: str | None, seed: int) -> Split:
    """Split keys by patterns, by their first folder, or at random into halves.

    Raises:
        JobError: a part is empty, or an image is in both.
    """
    if train is not None and val is not None:
        parts = [tuple(key for key in keys if fnmatch.fnmatchcase(key, pattern)) for pattern in (train, val)]
        described = f"--train {train}, --val {val}"
    else:
        folders = {key.split("/")[0] for key in keys if "/" in key}
        chosen = [next((name for name in names if name in folders), None) for names in (_TRAIN, _VAL)]
        parts = [tuple(key for key in keys if name is not None and key.startswith(f"{name}/")) for name in chosen]
        described = f"folders {chosen[0]}/, {chosen[1]}/"
        if not all(parts):
            order = np.random.default_rng(seed).permutation(len(keys))
            half = sorted(order[: len(keys) // 2].tolist())
            parts = [tuple(keys[i] for i in half), tuple(keys[i] for i in sorted(set(order.tolist()) - set(half)))]
            described = f"random halves, seed {seed}"
    for purpose, part in zip(("train", "evaluate"), parts, strict=True):
        if not part:
            raise JobError(
                f"no image is left to {purpose} on, of {counted(len(keys), 'image')} ({described}); keys look like "
                f"{keys[0]!r}"
            )
    if both := set(parts[0]) & set(parts[1]):
        raise JobError(
            f"--train {train} and --val {val} have {counted(len(both), 'image')} in common, such as {min(both)!r}"
        )
    if others := len(keys) - len(parts[0]) - len(parts[1]):
        described += f"; {counted(others, 'image')} in neither"
    return Split(parts[0], parts[1], described)


def spread(keys: Sequence[str], limit: int | None) -> tuple[str, ...]:
    """At most ``limit`` keys, spread evenly."""
    count = len(keys) if limit is None else min(limit, len(keys))
    return tuple(keys[i * len(keys) // count] for i in range(count))
