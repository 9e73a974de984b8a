"""The training loop of one process, alone or under DDP; independent of Ray."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densefeat.storage.objects import Objects
from pipeline.errors import JobError, TrainingDiverged
from pipeline.features.backbone import Backbone
from pipeline.features.layers import choice_label
from pipeline.io.storage import storage_explained
from pipeline.reporting.seconds import StageSeconds
from pipeline.train.build import TrainStages, build_stages
from pipeline.train.checkpoints import HeldOutRow, LossRow, load_newest, save
from pipeline.train.data import Draw, TrainingOrder, training_batches
from pipeline.train.held_out import Upsample, ViewError
from pipeline.train.objectives.base import LOSS, Objective
from pipeline.train.plan import TrainPlan
from pipeline.train.result import write_record, write_result
from pipeline.train.world import World
from pipeline.upsamplers.bilinear import Bilinear
from pipeline.upsamplers.jbu import JBU

__all__ = ["Training", "autocast", "train"]

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_STEP = ("data", "backbone", "forward", "backward", "optimizer")  # the stages of a step


def train(plan: TrainPlan, world: World, *, threads: int, built: list[Backbone] | None = None) -> None:
    """Run one process of a training, from its newest checkpoint to its result.

    Args:
        plan: plan of the training.
        world: this process.
        threads: number of threads for decoding.
        built: as for `build_stages`.

    Raises:
        JobError: the training cannot run as configured, or it diverged.
    """
    stages = build_stages(plan, world, threads, built)
    training = Training(plan, stages, world)
    try:
        training.run()
    except TrainingDiverged:
        if world.leads:
            write_record(plan, training.state)  # includes steps after the last checkpoint, for diagnosis
        world.gather(None)  # wait for it: the first process to exit ends the others
        raise
    if world.leads:
        logger.info("%s", training.explain_seconds())
        write_result(plan, stages, training.state)


def autocast(device: torch.device, objective: Objective) -> torch.autocast:
    """Autocast context for an objective's ``forward``: bfloat16 on a GPU if the objective allows it, else float32.

    Parameters, gradients and the optimizer state are always float32. bfloat16 has float32's range, so losses need no
    scaling.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and objective.mixed_precision)


class Training:
    """One process's part of a training, resumed from the newest checkpoint in --output, if there is one.

    Args:
        plan: plan of the training.
        stages: stages built for the plan.
        world: this process.

    Attributes:
        state: progress and record.
        seconds: busy seconds by stage: those of a step (backbone includes random views), held-out views, checkpoint.

    Raises:
        JobError: all checkpoints are damaged, or the processes find different ones.
    """

    def __init__(self, plan: TrainPlan, stages: TrainStages, world: World) -> None:
        self._plan, self._stages, self._world = plan, stages, world
        self._objects = Objects(plan.config.output)
        self._optimizer = stages.objective.optimizer(plan.config.effective_learning_rate)
        self.seconds = StageSeconds()
        with storage_explained(f"--output {plan.config.output}", "read"):
            self.state = load_newest(self._objects)
        self._check_shared()
        self._safe_at = self.state.step
        if self.state.step:
            self._restore()

    def _restore(self) -> None:
        try:
            self._stages.objective.load_state_dict(self.state.model)
            self._optimizer.load_state_dict(self.state.optimizer)
        except (RuntimeError, ValueError, LookupError) as error:
            raise JobError(
                f"--resume: the checkpoint of step {self.state.step} in {self._objects.uri} is for another network, or "
                f"another version of densefeat: delete it to resume from the one before, or start over with another "
                f"--output ({error})"
            ) from error

    def run(self) -> None:
        """Train up to --steps.

        Raises:
            TrainingDiverged: a loss, a gradient or a weight is not finite; the last checkpoint is good.
            JobError: too many images cannot be used.
        """
        config, state = self._plan.config, self.state
        model = self._distributed()
        if not state.held_out:
            self._measure()
        if state.step >= config.steps:
            self._log("nothing to train: --steps %d, and step %d is done", config.steps, state.step)
        logged_at, logged, spent = time.monotonic(), state.step, 0.0
        for keys, images in self._batches(range(state.step, config.steps)):
            losses = self._step(model, keys, images)
            state.losses.append(LossRow(state.step + 1, _label(self._backbone), losses))
            state.step += 1
            last = state.step == config.steps
            if last or state.step % config.evaluate_every == 0:
                self._measure()
            if last or state.step % config.checkpoint_every == 0:
                self._checkpoint()
            if last or time.monotonic() - logged_at > _LOG_EVERY_S:
                total = sum(self.seconds.total().get(stage, 0) for stage in _STEP)
                rate = (total - spent) / (state.step - logged)
                self._log("step %d/%d: loss %.4g, %.2f s per step", state.step, config.steps, losses[LOSS], rate)
                logged_at, logged, spent = time.monotonic(), state.step, total

    def _check_shared(self) -> None:
        """Check that all processes find the same step: on a node's local disk, other nodes would start over."""
        steps = self._world.gather(self.state.step)
        if len(set(steps)) > 1:
            raise JobError(
                f"--output {self._plan.config.output}: the workers find checkpoints of the steps "
                f"{', '.join(map(str, steps))}: --output must be storage that all nodes share (a shared folder, s3://, "
                "gs://)"
            )

    def explain_seconds(self) -> str:
        """Total seconds and the share of each stage, for the log."""
        seconds = self.seconds.total()
        total = sum(seconds.values()) or 1.0
        shares = ", ".join(f"{name} {100 * spent / total:.0f}%" for name, spent in seconds.items())
        return f"{total:.0f} s: {shares}"

    @property
    def _turn(self) -> int:
        """Index of the next step's backbone: they take turns, identically in all processes."""
        return self.state.step % len(self._stages.backbones)

    @property
    def _backbone(self) -> Backbone:
        return self._stages.backbones[self._turn]

    def _distributed(self) -> nn.Module:
        """The module that computes the losses; with several processes, DDP averages its gradients."""
        if self._world.size == 1:
            return self._stages.objective
        objective = self._stages.objective
        unused = objective.has_heads and len(self._stages.backbones) > 1
        return DistributedDataParallel(objective, find_unused_parameters=unused)

    def _batches(self, steps: range) -> Iterator[tuple[list[str], Tensor]]:
        config, references = self._plan.config, self._plan.train.references
        order = TrainingOrder(references.num_rows, config.batch_images, self._world.size, config.seed)
        batches = training_batches(references, self._stages.loader, order, self._world.rank, steps)
        while True:
            with self._timed("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _step(self, model: nn.Module, keys: list[str], images: Tensor) -> dict[str, float]:
        """Run one step; return its losses, averaged over the processes."""
        with self._timed("backbone"):
            draw = Draw(self._plan.config.seed, self.state.step, self._world.rank)
            prepared = self._stages.objective.prepare(self._turn, images.to(self._world.device), draw)
        with self._timed("forward"), autocast(self._world.device, self._stages.objective):
            losses: dict[str, Tensor] = model(prepared)
        with self._timed("backward"):
            self._optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses[LOSS])
            gradients = [p.grad for p in self._stages.objective.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
        own = torch.stack([loss.detach() for loss in losses.values()])
        averages = (self._world.total(own.clone()) / self._world.size).tolist()
        if not all(map(math.isfinite, [*averages, norm])):
            self._diverged(keys, bool(own.isfinite().all()), averages[0], norm)
        with self._timed("optimizer"):
            self._optimizer.step()
            self._stages.objective.after_step()
        return dict(zip(losses, averages, strict=True))

    def _diverged(self, keys: list[str], finite: bool, loss: float, norm: float) -> None:
        """Stop. All processes get here together, as the averages are the same in all."""
        batches = self._world.gather((keys, finite))
        # If all losses are finite, a gradient is not, and its process is unknown.
        suspects = [names for names, is_finite in batches if not is_finite] or [names for names, _ in batches]
        raise TrainingDiverged(
            f"step {self.state.step + 1}: the loss is {loss:.3g} and the norm of its gradient {norm:.3g}: training "
            f"stops. Its batch: {', '.join(key for names in suspects for key in names)}. {self._advice()}"
        )

    def _advice(self) -> str:
        kept = f"The checkpoint of step {self._safe_at} is good" if self._safe_at else "There is no checkpoint yet"
        config, lower = self._plan.config, "--learning-rate"
        if config.upsampler == "lift":
            lower += " or --lift-consistency"
        elif config.target == "views":
            lower += " or --crf-weight"
        return (
            f"{kept} ({self._objects.uri}). Check these images, or start over with a lower {lower} in another --output"
        )

    def _measure(self) -> None:
        """Measure the current upsampler on held-out views; the first time, also those that are not trained."""
        self._world.follow_lead(self._stages.objective.buffers())  # BatchNorm statistics: measure what will be saved
        with self._timed("held-out views"):
            for backbone in self._stages.measured:
                label, rows = _label(backbone), self.state.held_out
                known = next((row.errors for row in rows if row.backbone == label), None)
                objective = self._stages.objective
                upsamplers: dict[str, Upsample] = {objective.name: objective.upsample}
                if known is None:
                    upsamplers |= {"bilinear": Bilinear(), "training_free": JBU().to(self._world.device)}
                new = self._stages.views.errors(backbone, upsamplers, self._world)
                errors: dict[str, ViewError] = {**(known or {}), **new}
                rows.append(HeldOutRow(self.state.step, label, backbone in self._stages.backbones, errors))
                listed = ", ".join(f"{name} {error.relative:.4f}" for name, error in errors.items())
                self._log("step %d: error on held-out views of %s: %s", self.state.step, label, listed)

    def _checkpoint(self) -> None:
        self._world.follow_lead(self._stages.objective.buffers())
        state = self._stages.objective.state_dict()
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise TrainingDiverged(f"step {self.state.step}: a weight is not finite: training stops. {self._advice()}")
        if self._world.leads:
            self.state.model, self.state.optimizer = state, self._optimizer.state_dict()
            with self._timed("checkpoint"), storage_explained(self._objects.uri):
                save(self.state, self._objects)
        self._safe_at = self.state.step

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        with self.seconds.stage(stage):
            yield
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)

    def _log(self, text: str, *values: object) -> None:
        if self._world.leads:
            logger.info(text, *values)


def _label(backbone: Backbone) -> str:
    return choice_label(backbone.name, backbone.layer)
