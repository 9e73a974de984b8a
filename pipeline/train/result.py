"""Results of a training: weights with provenance, tables of the record, and curves."""

import io
import json
from dataclasses import asdict

import torch

from densefeat.storage.objects import Objects
from pipeline.features.provenance import Provenance
from pipeline.io.outputs import write_output_file
from pipeline.io.storage import storage_explained
from pipeline.reporting.software import commit, software_versions
from pipeline.train.build import TrainStages
from pipeline.train.checkpoints import TrainState, tables
from pipeline.train.curves import curves
from pipeline.train.objectives.base import Objective
from pipeline.train.output import CURVES, WEIGHTS
from pipeline.train.plan import TrainPlan

__all__ = ["provenance", "write_record", "write_result"]


def write_result(plan: TrainPlan, stages: TrainStages, state: TrainState) -> None:
    """Write weights, tables and curves to --output, and FeatUp's layout if requested.

    Raises:
        JobError: an output cannot be written.
    """
    weights = {name: tensor.contiguous() for name, tensor in stages.objective.weights().items()}
    with storage_explained(f"--output {plan.config.output}"):
        objects = Objects(plan.config.output)
        objects.put(WEIGHTS, provenance(plan, stages.objective, state).safetensors(weights))
    write_record(plan, state)
    if plan.config.featup_checkpoint is not None:
        checkpoint = _featup_checkpoint(weights, num_chs=stages.backbones[0].num_chs)
        write_output_file("--featup-checkpoint", plan.config.featup_checkpoint, checkpoint)


def write_record(plan: TrainPlan, state: TrainState) -> None:
    """Write tables and curves to --output, also for a training that diverged.

    Raises:
        JobError: --output cannot be written.
    """
    with storage_explained(f"--output {plan.config.output}"):
        objects = Objects(plan.config.output)
        objects.put(CURVES, curves(state))
        for name, table in tables(state).items():
            objects.put(name, table.encode())
        objects.sweep()


def provenance(plan: TrainPlan, objective: Objective, state: TrainState) -> Provenance:
    """Provenance of the weights, for the metadata of their file.

    ``upsampler``, ``backbones``, and ``final`` or ``patch`` are read when weights are used; the rest is informative.
    """
    newest = {row.backbone: row for row in state.held_out}
    errors = {
        label: {"step": row.step, "trained_on": row.trained_on, **{n: asdict(e) for n, e in row.errors.items()}}
        for label, row in newest.items()
    }
    details = {
        **objective.metadata(),
        "steps": str(state.step),
        "images": str(plan.train.references.num_rows),
        "seed": str(plan.config.seed),
        "held_out_errors": json.dumps(errors),
        "configuration": json.dumps(plan.configuration),
        "versions": json.dumps(software_versions()),
        "commit": commit(),
    }
    return Provenance(objective.name, tuple(plan.identities), details)


def _featup_checkpoint(weights: dict[str, torch.Tensor], num_chs: int) -> bytes:
    """Serialise to the layout of FeatUp's published checkpoints.

    The layout requires a final convolution; without one, zeros are written, which add nothing.
    """
    final = {
        "fixup_proj.1.weight": torch.zeros(num_chs, num_chs, 1, 1),
        "fixup_proj.1.bias": torch.zeros(num_chs),
    }
    buffer = io.BytesIO()
    torch.save({"state_dict": {f"upsampler.{name}": tensor for name, tensor in {**final, **weights}.items()}}, buffer)
    return buffer.getvalue()
