"""Make one store of several: rows are copied as they are stored, without images, backbone or decoding."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np

from densefeat import layout
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import emptied, in_order
from pipeline.errors import JobError
from pipeline.reporting.seconds import StageSeconds
from pipeline.store.converting.copying import CopiedRows, copied_rows
from pipeline.store.converting.joining import Joined, Part
from pipeline.store.converting.places import FREE_SOME, finish_with, source_differences, store_at
from pipeline.store.layout import claim, complete_setup
from pipeline.store.retirement import add
from pipeline.store.shard import NewShard, finished_shards, write_shard
from pipeline.store.space import check_space
from schemas.attributes import StoreAttributes
from schemas.index import pending_index
from schemas.ledger import LedgerRecord

__all__ = ["merge"]


def merge(whole: Joined, target: Objects, *, resume: bool, threads: int) -> int:
    """Write the store that others make together.

    The chunks of features and guidance images are copied byte for byte, and embeddings value by value. A killed merge
    is continued with ``resume``. Rows are read with range requests, each byte once.

    Args:
        whole: the store (`pipeline.store.converting.joining.joined`).
        target: its location.
        resume: continue the store at this location.
        threads: requests at the same time.

    Returns:
        Number of shards.

    Raises:
        JobError: there is a store at the location and ``resume`` is not set, or it is another one; or a local disk has
            no space for it.
        StoreError: a chunk of a store is missing or damaged; shards before it are done.
    """
    stored = store_at(target, resume=resume)
    if stored is None:
        check_space(target, whole.nbytes, FREE_SOME)
        fit = whole.fitted.upsampler
        claim(target, whole.attributes, whole.fitted.basis, whole.fitted.step, {} if fit is None else fit.arrays)
    elif different := _differences(stored, whole.attributes):
        raise JobError(f"the store at {target.uri} is another one: {'; '.join(different)}")
    stored = complete_setup(target, whole.features, pending_index(whole.references))
    features, done = whole.features, finished_shards(target, stored.hash)
    check_space(target, whole.nbytes * (1 - len(done) / features.shards), FREE_SOME)
    if len(done) < features.shards:
        add(target, whole.retired)  # a shard that is computed again must not bring rows back
    finish_with(target, features, done, lambda shard: _shard(whole, target, shard, stored.hash, threads))
    return features.shards


def _differences(stored: StoreAttributes, asked: StoreAttributes) -> list[str]:
    different = source_differences(stored, asked)
    if stored.step_sha256 != asked.step_sha256:
        different.append("it has other quantization steps")
    return different


def _shard(whole: Joined, target: Objects, shard: int, digest: str, threads: int) -> LedgerRecord:
    seconds, rows, shard_rows = StageSeconds(), whole.features.rows_of(shard), whole.features.shard_rows

    def read(piece: tuple[Part, range, int]) -> CopiedRows:
        part, own, first = piece
        with seconds.stage("read"):
            copied = copied_rows(part.store, part.objects, part.index, own)
        for outcome in copied.outcomes:
            outcome.row += first
        return copied

    copied = CopiedRows()
    for piece in in_order(read, _pieces(whole, rows, -(-len(rows) // threads)), threads):
        copied.extend(piece)
    companions = {}
    if copied.guidance:
        companions[layout.GUIDANCE] = layout.pack_shard(emptied(copied.guidance), shard_rows, index_first=True)[0]
    if copied.embeddings:
        companions[layout.EMBEDDING] = encode_embeddings(np.concatenate(copied.embeddings), shard_rows)
    made_by = {"host": socket.gethostname(), "pid": str(os.getpid()), "device": "cpu", "upsampled_by": "merge"}
    facts: dict[str, Any] = {"configuration_hash": digest, "clipped": _clipped(whole, rows), "made_by": made_by}
    return write_shard(
        target, NewShard(shard, shard_rows, emptied(copied.chunks), copied.outcomes, facts, seconds, companions)
    )


def _pieces(whole: Joined, rows: range, most: int) -> Iterator[tuple[Part, range, int]]:
    """The parts that rows come from, in order, with their own numbers there and the number of their first row here.

    Each piece is in one shard of its part, and has at most ``most`` rows.
    """
    for part, start in whole.starts():
        here = range(max(rows.start, start), min(rows.stop, start + len(part.store)))
        shard_rows, row = part.store.layout.shard_rows, here.start - start
        while row < here.stop - start:
            end = min((row // shard_rows + 1) * shard_rows, row + most, here.stop - start)
            yield part, range(row, end), start
            row = end


def _clipped(whole: Joined, rows: range) -> int:
    """Number of clipped values: those of a part's shard count where its first row is, because rows have none."""
    return sum(
        count
        for part, start in whole.starts()
        for shard, count in enumerate(part.clipped)
        if start + shard * part.store.layout.shard_rows in rows
    )
