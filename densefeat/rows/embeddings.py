"""Embeddings of images: one vector per row, in chunks of a shard's rows."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from densefeat import layout
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order

__all__ = ["encode_embeddings", "read_embeddings"]


def encode_embeddings(embeddings: npt.NDArray[np.float16], shard_rows: int) -> bytes:
    """Encode the embeddings [n, D] of a shard's rows, NaN where there is none, as its chunk.

    The last shard may have fewer rows than ``shard_rows``: its chunk has rows beyond the end of the array.
    """
    chunk = np.full((shard_rows, embeddings.shape[1]), np.nan, np.float16)
    chunk[: len(embeddings)] = embeddings
    return layout.encode_chunk(chunk)


def read_embeddings(objects: Objects, rows: Sequence[int], shard_rows: int, channels: int) -> npt.NDArray[np.float32]:
    """Read the embeddings of rows, each chunk once: [n, D] float32.

    Args:
        objects: the store.
        rows: their numbers.
        shard_rows: rows of a shard.
        channels: D.

    Raises:
        FileNotFoundError: the object of a shard is missing; the message is its key.
        ValueError: an object is damaged; the message begins with its key.
    """
    numbers = np.asarray(rows, dtype=np.int64).reshape(-1)
    found = np.empty((len(numbers), channels), dtype=np.float32)
    order = np.argsort(numbers // shard_rows, kind="stable")
    shards, first = np.unique(numbers[order] // shard_rows, return_index=True)
    places = dict(zip(shards.tolist(), np.split(order, first[1:]), strict=True)) if len(numbers) else {}

    def fill(shard: int) -> None:
        key = layout.shard_key(shard, layout.EMBEDDING)
        try:
            chunk = layout.decode_values(objects.get(key), "float16", (shard_rows, channels))
        except FileNotFoundError:
            raise FileNotFoundError(key) from None
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{key} is damaged: {error}") from error
        here = places[shard]
        found[here] = chunk[numbers[here] % shard_rows]

    for _ in in_order(fill, list(places)):
        pass
    return found
