"""Ray Train: run a training with several processes on a cluster, and restart them when one dies.

Ray only starts and connects the processes. Checkpoints are the training's own, the same files with and without Ray.
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

    When a worker dies, all are restarted, up to --attempts times; training resumes from the newest checkpoint.

    Raises:
        JobError: the cluster lacks the devices; workers died too often; the training cannot run as configured, or
            diverged.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # the default in newer versions
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # keep relative paths valid in workers
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # checkpoints are frequent enough without notice
    try:
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
    except ImportError as error:  # it needs packages that the rest of ray does not
        raise JobError(
            f"--workers {plan.config.workers} needs Ray Train, which cannot be imported ({error}): "
            "pip install -e '.[train]', or omit --workers to train in one process"
        ) from error
    with connected(dashboard=True), temporary_folder("densefeat-train-") as ray_files:
        on_gpus, cpus = _resources(plan)
        trainer: Any = TorchTrainer(
            _run_worker,
            train_loop_config={"plan": plan, "granted": None if on_gpus else cpus},
            scaling_config=ScalingConfig(
                num_workers=plan.config.workers,
                use_gpu=on_gpus,
                resources_per_worker={"CPU": cpus, "GPU": int(on_gpus)},
            ),
            run_config=RunConfig(name="train", storage_path=str(ray_files), **_quiet()),
        )
        logger.info("starting %d workers; the cluster has %s", plan.config.workers, ray.cluster_resources())
        _with_retries(lambda: _interruptible(trainer.fit), plan.config.attempts, TrainingFailedError)


def _run_worker(settings: dict[str, Any]) -> None:
    """Entry point of each worker process."""
    from ray.train import get_context
    from ray.train.torch import get_device

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    context = get_context()
    # Each worker counts its own node's cores: the driver's cores and cluster totals do not determine them.
    threads = threads_in_training(available_cores(), context.get_local_world_size(), settings["granted"])
    torch.set_num_threads(threads)
    world = World(get_device(), context.get_world_rank(), context.get_world_size())
    train(settings["plan"], world, threads=threads)


def _quiet() -> dict[str, Any]:
    """Settings that silence Ray Train's own logging; empty for older versions, which lack them."""
    logging_config: Any = getattr(ray.train, "LoggingConfig", None)
    return {} if logging_config is None else {"logging_config": logging_config(log_level="CRITICAL")}


def _resources(plan: TrainPlan) -> tuple[bool, int]:
    """Decide whether to train on GPUs, and the CPUs of each worker.

    Raises:
        JobError: there are too few devices, on a local cluster that cannot grow.
    """
    nodes = living_nodes()
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    on_gpus = plan.config.device == "cuda" or (plan.config.device == "auto" and gpus > 0)
    available = gpus if on_gpus else cpus
    if plan.config.workers > available and not os.environ.get("RAY_ADDRESS"):
        raise JobError(
            f"--workers {plan.config.workers} on {'GPUs' if on_gpus else 'CPUs'}, but there are {available}: use "
            f"fewer{', or --device cpu' if on_gpus else ''}"
        )
    # A GPU worker requests no CPU, so that it can be placed wherever there is a GPU; it sets its own thread count.
    return on_gpus, 0 if on_gpus else cpus_of_each([node.cpus for node in nodes], plan.config.workers)


def _with_retries(fit: Callable[[], None], attempts: int, failure: type[Exception]) -> None:
    """Call ``fit``; retry up to ``attempts`` times if it raises ``failure``, unless one of our own errors caused it."""
    for deaths in range(1, attempts + 2):
        try:
            fit()
            return
        except failure as error:
            _raise_if_ours(error)
            if deaths > attempts:
                raise JobError(
                    f"workers died {deaths} times; the last error: {last_line(error)}. --resume continues from "
                    "the newest checkpoint"
                ) from error
            logger.warning("a worker died; training continues from the newest checkpoint: %s", last_line(error))


def _interruptible(fit: Callable[[], Any]) -> None:
    """Call ``fit`` in a thread: in the main thread, Ray would handle Ctrl-C itself."""
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def call() -> None:
        try:
            fit()
        except BaseException as error:  # re-raised in the main thread
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    error = outcome.get()
    if error is not None:
        raise error


def _raise_if_ours(error: Any) -> None:
    """Raise a worker's own error, divergence first: retries would not help, and other workers only fail with it."""
    failures = getattr(error, "worker_failures", {}).values()
    ours = [failure for failure in failures if isinstance(failure, DensefeatError)]
    for failure in sorted(ours, key=lambda failure: not isinstance(failure, TrainingDiverged)):
        raise failure from None
