"""Ray Train: processes that train together on a cluster's devices, and begin again when one dies.

Ray starts the processes and connects them. Checkpoints are
the training's own: the same files, whether Ray takes part or not.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import ray
import torch

from densefeat.errors import DensefeatError
from pipeline.errors import JobError, TrainingDiverged
from pipeline.io.storage import temporary_folder
from pipeline.run.ray.cluster import connected, last_line, living_nodes
from pipeline.run.resources import available_cores, cpus_of_each, threads_in_training
from pipeline.train.loop import train
from pipeline.train.plan import TrainPlan
from pipeline.train.world import World

__all__ = ["train_on_ray"]

logger = logging.getLogger(__name__)


def train_on_ray(plan: TrainPlan) -> None:
    """Train with --workers processes on the cluster that RAY_ADDRESS names, or on this machine.

    A worker that dies, and the others with it, is started again up to --attempts times; training goes on from its
    newest checkpoint.

    Raises:
        JobError: the cluster lacks the devices; workers died too often; it cannot be done as asked, or diverged.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # the default of newer versions
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in a worker as here
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # checkpoints come often enough without notice
    try:
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
    except ImportError as error:  # it wants packages that ray's other parts do without
        raise JobError(
            f"--workers {plan.config.workers} needs Ray Train, which cannot be imported ({error}): "
            "pip install -e '.[train]', or leave --workers out to train in one process"
        ) from error
    with connected(dashboard=True), temporary_folder("densefeat-train-") as ray_files:
        on_gpus, cpus = _resources(plan)
        trainer: Any = TorchTrainer(
            _be_a_worker,
            train_loop_config={"plan": plan, "granted": None if on_gpus else cpus},
            scaling_config=ScalingConfig(
                num_workers=plan.config.workers,
                use_gpu=on_gpus,
                resources_per_worker={"CPU": cpus, "GPU": int(on_gpus)},
            ),
            run_config=RunConfig(name="train", storage_path=str(ray_files), **_quiet()),
        )
        logger.info("starting %d workers; the cluster has %s", plan.config.workers, ray.cluster_resources())
        _persistently(lambda: _interruptible(trainer.fit), plan.config.attempts, TrainingFailedError)


def _be_a_worker(settings: dict[str, Any]) -> None:
    """What each process runs."""
    from ray.train import get_context
    from ray.train.torch import get_device

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    context = get_context()
    # Each counts the cores of its own node: the driver's says nothing of them, nor do the cluster's sums.
    threads = threads_in_training(available_cores(), context.get_local_world_size(), settings["granted"])
    torch.set_num_threads(threads)
    world = World(get_device(), context.get_world_rank(), context.get_world_size())
    train(settings["plan"], world, threads=threads)


def _quiet() -> dict[str, Any]:
    """Settings with which Ray Train leaves talking to us; older versions have none."""
    logging_config: Any = getattr(ray.train, "LoggingConfig", None)
    return {} if logging_config is None else {"logging_config": logging_config(log_level="CRITICAL")}


def _resources(plan: TrainPlan) -> tuple[bool, int]:
    """Whether to train on GPUs, and the CPUs of each worker.

    Raises:
        JobError: there are too few, on a cluster that will not add any.
    """
    nodes = living_nodes()
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    on_gpus = plan.config.device == "cuda" or (plan.config.device == "auto" and gpus > 0)
    available = gpus if on_gpus else cpus
    if plan.config.workers > available and not os.environ.get("RAY_ADDRESS"):
        raise JobError(
            f"--workers {plan.config.workers} on {'GPUs' if on_gpus else 'CPUs'}, but there are {available}: ask for "
            f"fewer{', or --device cpu' if on_gpus else ''}"
        )
    # A GPU's worker asks for no CPU, so that it fits wherever there is a GPU, and counts its threads by itself.
    return on_gpus, 0 if on_gpus else cpus_of_each([node.cpus for node in nodes], plan.config.workers)


def _persistently(fit: Callable[[], None], attempts: int, failure: type[Exception]) -> None:
    """Call ``fit``, and up to ``attempts`` times again where it raises ``failure`` that is not of our making."""
    for deaths in range(1, attempts + 2):
        try:
            fit()
            return
        except failure as error:
            _raise_if_ours(error)
            if deaths > attempts:
                raise JobError(
                    f"workers died {deaths} times, the last one of this: {last_line(error)}. --resume goes on from "
                    "the newest checkpoint"
                ) from error
            logger.warning("a worker died; training continues from the newest checkpoint: %s", last_line(error))


def _interruptible(fit: Callable[[], Any]) -> None:
    """Call ``fit`` in a thread: Ray, called in the main one, would take Ctrl-C for itself."""
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def call() -> None:
        try:
            fit()
        except BaseException as error:  # handed to whoever waits
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    error = outcome.get()
    if error is not None:
        raise error


def _raise_if_ours(error: Any) -> None:
    """Raise what a worker said cannot be done: trying again would not help. The others' losing it is no news."""
    failures = getattr(error, "worker_failures", {}).values()
    ours = [failure for failure in failures if isinstance(failure, DensefeatError)]
    for failure in sorted(ours, key=lambda failure: not isinstance(failure, TrainingDiverged)):
        raise failure from None
