"""State of a training: checkpoints with everything that the next step depends on, and its record as tables."""

import csv
import io
import logging
import re
import zipfile
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from densefeat.errors import DensefeatError
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.train.held_out import ViewError

__all__ = [
    "HELD_OUT",
    "LOSSES",
    "HeldOutRow",
    "LossRow",
    "TrainState",
    "has_checkpoints",
    "load_newest",
    "save",
    "tables",
]

logger = logging.getLogger(__name__)

LOSSES, HELD_OUT = "losses.csv", "held_out.csv"
_CHECKPOINT = re.compile(r"checkpoints/step_(\d{8,})\.pt")
_KEPT = 2  # the newest and one more, in case the last write is lost
_DIGITS = 9  # enough to distinguish any two float32 values


@dataclass(frozen=True)
class LossRow:
    """The losses of one step.

    Attributes:
        step: number of the step, from 1.
        backbone: backbone trained on in this step.
        losses: losses by name.
    """

    step: int
    backbone: str
    losses: dict[str, float]


@dataclass(frozen=True)
class HeldOutRow:
    """A measurement on held-out views.

    Attributes:
        step: number of steps done.
        backbone: backbone measured on.
        trained_on: whether this backbone is trained on.
        errors: errors by upsampler.
    """

    step: int
    backbone: str
    trained_on: bool
    errors: dict[str, ViewError]


@dataclass
class TrainState:
    """State after ``step`` steps.

    Attributes:
        step: number of steps done.
        model: state of the objective.
        optimizer: state of the optimizer.
        losses: losses of every step done.
        held_out: all measurements so far.
    """

    step: int = 0
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    losses: list[LossRow] = field(default_factory=list)
    held_out: list[HeldOutRow] = field(default_factory=list)


def save(state: TrainState, objects: Objects) -> None:
    """Write a complete checkpoint, then the tables, then delete all but the newest two checkpoints."""
    buffer = io.BytesIO()
    plain = {
        **{name: getattr(state, name) for name in ("step", "model", "optimizer")},
        "losses": [asdict(row) for row in state.losses],
        "held_out": [asdict(row) for row in state.held_out],
    }
    torch.save(plain, buffer)
    objects.put(f"checkpoints/step_{state.step:08}.pt", buffer.getvalue())
    for name, table in tables(state).items():
        objects.put(name, table.encode())
    for _, key in _checkpoints(objects)[_KEPT:]:
        objects.delete(key)


def has_checkpoints(objects: Objects) -> bool:
    """Whether there are any checkpoints, including damaged ones."""
    return bool(_checkpoints(objects))


def load_newest(objects: Objects) -> TrainState:
    """Load the newest readable checkpoint, or return a state at step 0 if there are no checkpoints.

    Raises:
        JobError: all existing checkpoints are damaged.
    """
    checkpoints = _checkpoints(objects)
    for _, key in checkpoints:
        try:
            plain = torch.load(_undamaged(objects.get(key)), map_location="cpu", weights_only=True)
            return TrainState(
                step=plain["step"],
                model=plain["model"],
                optimizer=plain["optimizer"],
                losses=[LossRow(**row) for row in plain["losses"]],
                held_out=[_held_out_row(row) for row in plain["held_out"]],
            )
        except FileNotFoundError:  # deleted since it was listed
            continue
        except (OSError, DensefeatError, MemoryError):  # says nothing about the checkpoint
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            logger.warning("checkpoint %s/%s is damaged: %s", objects.uri, key, type(error).__name__)
    if checkpoints:
        raise JobError(f"--resume: all checkpoints in {objects.uri} are damaged: start over with another --output")
    return TrainState()


def _undamaged(checkpoint: bytes) -> io.BytesIO:
    """Verify a checkpoint's zip checksums, because torch.load does not detect flipped bits; return it as a buffer.

    Raises:
        BadZipFile: the checkpoint is damaged.
    """
    buffer = io.BytesIO(checkpoint)
    with zipfile.ZipFile(buffer) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"checksum of {damaged}")
    buffer.seek(0)
    return buffer


def tables(state: TrainState) -> dict[str, str]:
    """`LOSSES` and `HELD_OUT` as CSV: independent of how often the training was interrupted."""
    losses = [{"step": row.step, "backbone": row.backbone, **_rounded(row.losses)} for row in state.losses]
    held_out = []
    for row in state.held_out:
        errors = {
            f"{upsampler}_{name}": value
            for upsampler, error in row.errors.items()
            for name, value in (("relative_error", error.relative), ("cosine", error.cosine))
        }
        trained_on = {"step": row.step, "backbone": row.backbone, "trained_on": int(row.trained_on)}
        held_out.append({**trained_on, **_rounded(errors)})
    return {LOSSES: _csv(losses), HELD_OUT: _csv(held_out)}


def _checkpoints(objects: Objects) -> list[tuple[int, str]]:
    """Step and key of each checkpoint, newest first."""
    matches = filter(None, map(_CHECKPOINT.fullmatch, objects.list("checkpoints")))
    return sorted(((int(match[1]), match[0]) for match in matches), reverse=True)


def _held_out_row(row: dict[str, Any]) -> HeldOutRow:
    return HeldOutRow(**{**row, "errors": {name: ViewError(**error) for name, error in row["errors"].items()}})


def _rounded(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.{_DIGITS}g}" for name, value in values.items()}


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()
