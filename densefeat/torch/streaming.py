"""A PyTorch dataset of batches of images with their dense features, in shuffled epochs that read each shard once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from densefeat.arguments import box_of, whole_number
from densefeat.store import FeatureStore
from densefeat.torch.batches import Images
from densefeat.torch.epochs import Batch, Epochs, State, check_least
from densefeat.torch.plan import Plan, Reader, Uneven, batches_of_rank, piece_of_batches, plan
from densefeat.torch.read_ahead import ReadAhead

_BATCHES_AHEAD = 2


class StreamingFeatures(Epochs):
    """Batches of images with their features, in shuffled epochs that read each shard once, with large requests.

    Each sample is a batch, a dict:

    - ``features``: [n, k, H, W] float32 tensor; with ``dequantize=False`` int8 or float16, as stored
    - ``row``: [n] int64 tensor, the rows of the store
    - ``key``: list of n str
    - ``label``: [n] int64 tensor, −1 if unknown
    - ``guidance``: [n, 3, H, W] uint8 tensor; only with ``dequantize=False`` from a compact store that has such images
    - ``box``: [n, 4] int64 tensor, (y0, x0, y1, x1) of the crops; only with ``crop`` or ``box``

    Pass ``batch_size=None`` to the loader, because samples are batches already::

        dataset = StreamingFeatures(store, batch_size=32)
        loader = DataLoader(dataset, batch_size=None, num_workers=2)
        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in loader:
                loss = criterion(model(batch["features"]), batch["label"])

    **Order.** Runs of neighbouring rows, which one request reads, come in random order, and rows are shuffled over
    ``buffer_bytes`` of them. The order depends on the rows, ``seed``, the epoch and all options up to ``uneven``, and
    on the numbers of ranks and workers; not on ``threads``.

    **Ranks and workers.** Over all ranks and workers, every row comes once in an epoch, and every rank has the same
    number of batches, ``len(dataset)``, so that collective operations do not wait for each other in vain. All batches
    are full, but for the last one or two of a rank.

    **Resuming.** ``state_dict`` and ``load_state_dict`` work with torchdata's ``StatefulDataLoader``, in a loop without
    a loader, and with a ``DataLoader`` if told how many batches were taken. After resuming, the rest of the epoch is
    the same. Numbers of ranks and workers must be the same.

    **Memory** of a process: ``buffer_bytes`` of encoded images, ``threads`` + 1 requests, and three batches. Guidance
    images of a compact store come on top.

    **Processes and threads.** Works under fork, spawn and forkserver. Threads end with the iterator, and their errors
    are raised by it.

    Args:
        store: a ``FeatureStore``, or its location (``str`` or ``Path``).
        batch_size: images per batch.
        shuffle: False: in the order of the store, e.g. for evaluation. Each worker of a loader has a part of it, and
            they take turns: the order of all batches is that of the store with one worker or none; ``row`` tells.
        seed: at least 0.
        rows: rows or keys to use, each once. None: all rows with features.
        buffer_bytes: encoded images that a process holds for shuffling. 0: no more than the order of the requests.
        request_bytes: about how much one request reads; smaller requests shuffle better.
        uneven: what to do where rows cannot be dealt out evenly. ``"balance"``: ranks have one row more or less, in
            equally many batches. ``"pad"``: some rows come twice, fewer than there are ranks. ``"drop"``: only full
            batches; up to world_size × batch_size − 1 rows are left out, others in every epoch.
        transform: applied to each batch in the worker.
        dequantize: False returns stored codes, to be dequantized on the device (`Dequantize`, `Reconstruct`).
        crop: (height, width) of a random crop of each image, another in every epoch; at most the size of the features.
        box: (y0, x0, y1, x1), y1 and x1 exclusive: the same crop of all images.
        threads: numbers of requests and of images decoded at a time, per process.
        rank: of this training process; with ``world_size``.
        world_size: number of training processes. None, as ``rank``: from ``torch.distributed`` if it is initialized
            when iteration begins, else from the environment variables RANK and WORLD_SIZE, which torchrun sets, else
            one process.

    Attributes:
        rows: [images] int64, the rows in use.

    Raises:
        KeyError, IndexError, TypeError: ``rows`` has an unknown row.
        MissingFeatures: some of ``rows`` have no features; its attribute ``rows`` has their numbers.
        ValueError: an argument is out of range; when iteration begins, the rows cannot be dealt out as ``uneven``
            says, a loaded state does not fit, or several ranks would choose rows of an unfinished store.
        StoreError: there is no store, or it is damaged; when iterating: a shard is missing or damaged.
        StorageUnavailable: when iterating: the storage does not answer.
    """

    _START: ClassVar[dict[str, int]] = {"batches": 0}

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        batch_size: int = 32,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rows: Iterable[int | str] | None = None,
        buffer_bytes: int = 256 << 20,
        request_bytes: int = 8 << 20,
        uneven: Uneven = "balance",
        transform: Callable[[Batch], Any] | None = None,
        dequantize: bool = True,
        crop: Sequence[int] | None = None,
        box: Sequence[int] | None = None,
        threads: int = 4,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_least({"batch_size": (batch_size, 1), "buffer_bytes": (buffer_bytes, 0), "threads": (threads, 1)})
        if uneven not in ("balance", "drop", "pad"):
            raise ValueError(f'uneven must be "balance", "drop" or "pad": got {uneven!r}')
        super().__init__(store, rows, seed, request_bytes, rank, world_size)
        self.batch_size, self.shuffle, self.uneven = int(batch_size), bool(shuffle), uneven
        self.buffer_bytes, self.threads = int(buffer_bytes), threads
        self.transform, self.dequantize = transform, dequantize
        self.crop, self.box = _checked_crop(crop, box, self.store.shape[1:])

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch, over all its workers.

        Raises:
            ValueError: the rows cannot be dealt out as ``uneven`` says.
        """
        return len(batches_of_rank(len(self.rows), *self.ranks, self.batch_size, self.uneven)[1])

    def state_dict(self, batches: int | None = None, workers: int = 0) -> State:
        """Where an iteration is: numbers and strings, which JSON can hold.

        torchdata's ``StatefulDataLoader`` calls it in its workers. Without a loader, or with one without workers, call
        it between two batches. With a ``DataLoader`` with workers, which read ahead, say how far the training is.

        Args:
            batches: number of batches of the epoch that the loop has taken, with those before a resume. None: as many
                as the iteration that this process began last has given.
            workers: ``num_workers`` of the loader, with ``batches``.

        Raises:
            ValueError: ``batches`` is not 0 … ``len(dataset)``.
        """
        if batches is None:
            return super().state_dict()
        check_least({"batches": (batches, 0), "workers": (workers, 0)})
        if batches > len(self):
            raise ValueError(f"batches must be at most {len(self)}, the batches of an epoch: got {batches}")
        reader = Reader(*self.ranks, 0, max(1, workers))
        begun = self._loaded or self._at  # loading a state chooses its epoch
        epoch = int(self._epoch) if begun is None else begun["epoch"]
        return {**self._state(epoch, reader, {"batches": int(batches)}), "worker": None}

    def _resumed(self, state: State, reader: Reader) -> tuple[Reader, dict[str, int]]:
        if state["worker"] is not None:
            return super()._resumed(state, reader)
        # A new loader begins with its first worker: that has to be the one whose turn it was.
        taken = state["position"]["batches"]
        worker = (reader.worker + taken) % reader.workers
        return replace(reader, worker=worker), {"batches": len(range(worker, taken, reader.workers))}

    def _options(self) -> dict[str, Any]:
        names = ("batch_size", "shuffle", "buffer_bytes", "uneven")
        part = {name: value and list(value) for name, value in (("crop", self.crop), ("box", self.box))}
        return {**super()._options(), **{name: getattr(self, name) for name in names}, **part}

    def _batches(self, epoch: int, reader: Reader, position: dict[str, int]) -> Iterator[tuple[dict[str, int], Batch]]:
        start, sizes = piece_of_batches(len(self.rows), reader, self.batch_size, self.uneven)
        seed = (self.seed, epoch) if self.shuffle else None
        done = position["batches"]
        rows = plan(self._runs, reader, (start, int(sizes.sum())), seed, self.buffer_bytes).after(
            int(sizes[:done].sum())
        )
        for number, batch in enumerate(self._read(rows, sizes[done:].tolist(), epoch), done + 1):
            yield {"batches": number}, batch if self.transform is None else self.transform(batch)

    def _read(self, rows: Plan, sizes: list[int], epoch: int) -> Iterator[Batch]:
        images = self._images(epoch)
        ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
        with ReadAhead(self.store, rows, self.threads) as reads:
            for numbers in np.split(rows.rows, np.cumsum(sizes[:-1])) if sizes else ():
                batch = images.batch(numbers)
                fills = [partial(images.fill, batch, place) for place in range(len(numbers))]
                ahead.append((batch, [reads.submit(fill) for fill in fills]))
                if len(ahead) > _BATCHES_AHEAD:
                    yield _filled(*ahead.popleft())
            while ahead:
                yield _filled(*ahead.popleft())

    def _images(self, epoch: int) -> Images:
        if self.box is not None:
            y0, x0, y1, x1 = box = self.box
            return Images(self.store, self.dequantize, (y1 - y0, x1 - x0), lambda row: box)
        if self.crop is None:
            return Images(self.store, self.dequantize)
        (height, width), (h, w) = self.store.shape[1:], self.crop

        def crop(row: int) -> tuple[int, ...]:
            y, x = np.random.default_rng([self.seed, epoch, row]).integers(0, [height - h, width - w], endpoint=True)
            return y, x, y + h, x + w

        return Images(self.store, self.dequantize, (h, w), crop)


def _filled(batch: Batch, fills: list[Future[None]]) -> Batch:
    for fill in fills:
        fill.result()
    return batch


def _checked_crop(
    crop: Sequence[int] | None, box: Sequence[int] | None, size: tuple[int, ...]
) -> tuple[tuple[int, int] | None, tuple[int, int, int, int] | None]:
    """``crop`` and ``box`` as integers, for images of this size.

    Raises:
        TypeError: they are not integers.
        ValueError: both are given, or they do not fit.
    """
    if box is not None:
        if crop is not None:
            raise ValueError(f"pass crop or box, not both: got crop={crop!r}, box={box!r}")
        y, x = box_of(box, *size)
        return None, (y.start, x.start, y.stop, x.stop)
    if crop is None:
        return None, None
    if not isinstance(crop, Iterable):
        raise TypeError(f"crop must be (height, width): got {crop!r}")
    sides = [whole_number(side, "each side of crop (height, width)") for side in crop]
    if len(sides) != 2 or not all(1 <= side <= most for side, most in zip(sides, size, strict=True)):
        raise ValueError(f"crop must be (height, width), 1 … {size[0]} and 1 … {size[1]}: got {crop!r}")
    return (sides[0], sides[1]), None
