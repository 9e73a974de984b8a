"""Workers of the main job for which images with a mark in their bytes are poison."""

import os
import signal
from typing import Any

from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import WorkerSpec
from pipeline.run.recipe import Stages
from pipeline.run.shard_worker import ShardWorker

KILLS, RAISES = b"this image kills", b"this image raises"


def make_poisoned(spec: WorkerSpec, stages: Stages | None = None) -> ShardWorker:
    """The real worker, but a decoder with two bugs: one takes the process with it, as a crash in a library does."""
    worker = ShardWorker(spec, stages)
    decode = worker.loader._decode

    def poisoned(data: Any, seconds: StageSeconds) -> Any:
        if isinstance(data, bytes) and KILLS in data:
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(data, bytes) and RAISES in data:
            raise RuntimeError("a bug in the decoder")
        return decode(data, seconds)

    worker.loader._decode = poisoned  # type: ignore[method-assign]
    return worker
