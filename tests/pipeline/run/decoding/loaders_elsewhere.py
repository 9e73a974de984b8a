"""Loaders and workers for other processes of the tests of decoding elsewhere, which find them by their names."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from pipeline.errors import ImageError
from pipeline.images.batches import Batch, BatchLoader, Loader
from pipeline.images.decoding.decode import Geometry
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import FeatureWorker, Turns, WorkerSpec
from pipeline.run.recipe import ImageRecipe
from pipeline.run.shard_worker import ShardWorker
from schemas.index import REFERENCES
from tests.helpers.scripted_workers import SPEC, poison

RECIPE = ImageRecipe("folder", None, Geometry((128, 128), "crop", (64, 64)), 1_000_000, 8)
ROWS, PLACE_S = 20, 60.0  # a new process takes seconds, and more when others use the machine


def references(folder: Path, rows: int = ROWS) -> pa.Table:
    names = [f"{i:02}.png" for i in range(rows)]
    nothing = [None] * rows
    return pa.table([names, [str(folder / name) for name in names], nothing, nothing, nothing], schema=REFERENCES)


class Elsewhere:
    """A loader that sends what it can elsewhere, and what it said of that."""

    def __init__(self, batch_size: int, make: Callable[[], BatchLoader] | None = None, **options: Any) -> None:
        from pipeline.run.ray.decoding.elsewhere import ElsewhereLoader

        self.images = 0
        settings: dict[str, Any] = {"starving": lambda: True, "least_here": 0, "place_s": PLACE_S, **options}
        here = settings.pop("here", None) or RECIPE.loader(batch_size, 2)
        make = make or RECIPE.loader_maker(batch_size, 1)
        self.loader = ElsewhereLoader(here, make, decoded=self._decoded, **settings)

    def _decoded(self, images: int) -> None:
        self.images += images


def plain(batch: Batch) -> tuple[bytes, list[Any]]:
    """All that a batch has, to be compared."""
    rows = [(image.status, str(image)) if isinstance(image, ImageError)
            else (image.pixels.tobytes(), image.height, image.width, image.affine, image.valid_box)
            for image in batch.decoded]  # fmt: skip
    return batch.pixels.numpy().tobytes(), rows


def all_of(loader: Loader, table: pa.Table, crashed: Mapping[int, str] | None = None) -> list[tuple[bytes, list[Any]]]:
    return [plain(batch) for batch in loader.batches(table, StageSeconds(), crashed or {})]


def slow_loader(seconds_per_image: float) -> BatchLoader:
    loader = RECIPE.loader(3 if seconds_per_image < 1 else 4, 1)
    decode = loader._decode

    def slow(data: Any, seconds: StageSeconds) -> Any:
        with seconds.stage("decode"):
            time.sleep(seconds_per_image)
        return decode(data, seconds)

    loader._decode = slow  # type: ignore[method-assign]
    return loader


def poisoned_loader(batch_size: int) -> BatchLoader:
    return poison(RECIPE.loader(batch_size, 1))


def failing_loader(batch_size: int, error: type[Exception]) -> BatchLoader:
    """It reads a part, then nobody answers."""
    loader = RECIPE.loader(batch_size, 1)
    reads = loader._reads

    def failing(*arguments: Any) -> Iterator[Any]:
        for number, data in enumerate(reads(*arguments)):
            if number == 9:  # when a batch was sent; and again, if it goes on from there
                raise error("nobody answers")
            yield data

    loader._reads = failing  # type: ignore[method-assign]
    return loader


def hanging_loader(begun: Path) -> BatchLoader:
    """It says in a file that it decodes, and never ends."""
    loader = RECIPE.loader(4, 1)

    def hanging(data: Any, seconds: StageSeconds) -> Any:
        begun.touch()
        time.sleep(3600)

    loader._decode = hanging  # type: ignore[method-assign]
    return loader


class WaitsForever:
    """A worker whose images are decoded elsewhere."""

    def begin(self, references: pa.Table, begun: Path) -> None:
        from pipeline.run.ray.decoding.elsewhere import ElsewhereLoader

        make = partial(hanging_loader, begun)
        loader = ElsewhereLoader(make(), make, starving=lambda: True, least_here=0, place_s=600.0)
        next(loader.batches(references, StageSeconds()))


def built_loader(device: Any, allowed: bool) -> str:
    """Which loader a worker on a device has, without the device."""
    import ray

    from pipeline.run.ray.actor import _build

    def make(spec: WorkerSpec) -> Any:
        loader = spec.recipe.images.loader(4, 1)
        return SimpleNamespace(spec=spec, batch_size=4, computing=Turns(1), loader=loader)

    spec = WorkerSpec(SPEC.recipe, device, None, 1, allowed)
    return type(_build(ray.cloudpickle.dumps((spec, make)), {}, 1, 1)[0].loader).__name__


def make_worker_that_starves(spec: WorkerSpec) -> FeatureWorker:
    """On a CPU, but as if on a GPU."""
    from pipeline.run.ray.decoding.elsewhere import decode_elsewhere

    worker = ShardWorker(spec)
    decode_elsewhere(worker, starving=lambda: True)
    return worker
