"""Make a dense store of another one, without its images or backbone."""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from densefeat import layout
from densefeat.layout import ZSTD_LEVEL, FeatureLayout, step_sha256
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import emptied, in_order
from densefeat.storage.places import overlap
from densefeat.store import FeatureStore
from kernels.quantization import Encoding
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.reporting.seconds import StageSeconds
from pipeline.reporting.software import software_versions
from pipeline.store.calibration import Calibration, choose_steps
from pipeline.store.converting.copying import outcomes_of
from pipeline.store.converting.places import FREE_SOME, finish_with, source_differences, store_at
from pipeline.store.fitted import stored_fit
from pipeline.store.layout import claim, complete_setup, stored_attributes
from pipeline.store.retirement import add
from pipeline.store.shard import NewShard, finished_shards, write_shard
from pipeline.store.space import check_space, check_space_for_rest
from schemas.attributes import StoreAttributes
from schemas.configuration import StorageConfiguration
from schemas.index import OK, PENDING, REFERENCES, pending_index
from schemas.ledger import LedgerRecord, RowOutcome

__all__ = ["DenseStorage", "convert"]

logger = logging.getLogger(__name__)

_SAMPLED = 32  # rows whose features set the quantization steps, and tell how large the store will be


@dataclass(frozen=True)
class DenseStorage:
    """How the dense store holds its features.

    Attributes:
        dtype: "int8" or "float16".
        error_floor: as for `pipeline.store.calibration.choose_steps`.
        shard_rows: rows of a shard.
    """

    dtype: str
    error_floor: float
    shard_rows: int


def convert(source: FeatureStore, target: Objects, storage: DenseStorage, *, resume: bool, threads: int) -> int:
    """Write a dense store with the features, embeddings and index of another store.

    The new store has the configuration of the old one, but for how features are stored, and says from which
    representation it was converted. A killed conversion is continued with ``resume``.

    Args:
        source: a finished store of any representation.
        target: location of the new store.
        storage: how it holds features.
        resume: continue the store at this location.
        threads: rows that are read and encoded at a time.

    Returns:
        Number of shards of the new store.

    Raises:
        JobError: the source is not finished; there is a store at the location and ``resume`` is not set, or it is
            another one; or a local disk has no space for it.
    """
    if overlap(source.uri, target.uri):
        raise JobError(f"{source.uri} and {target.uri} are the same place, or one is in the other: choose another one")
    if PENDING in source.index["status"].unique().to_pylist():
        raise JobError(f"{source.uri} is not finished: finish it first, with --resume")
    features = FeatureLayout(len(source), *source.shape, storage.dtype, storage.shard_rows)
    if store_at(target, resume=resume) is None:
        _set_up(source, target, storage)
    stored = complete_setup(target, features, pending_index(source.index.select(REFERENCES.names).cast(REFERENCES)))
    if different := source_differences(stored, _attributes(source, storage, None)):
        raise JobError(f"the store at {target.uri} is another one: {'; '.join(different)}")
    _write(source, target, features, stored.hash, threads)
    return features.shards


def _set_up(source: FeatureStore, target: Objects, storage: DenseStorage) -> None:
    sample = _sample(source)
    step = _steps(source, sample, storage)
    if target.local_path is not None:  # else there is nothing to check, and nothing to encode for it
        check_space(target, _image_nbytes(source, sample, step) * len(source.rows_with_features), FREE_SOME)
    attributes = _attributes(source, storage, step)
    fit = stored_fit(source, attributes.configuration)
    claim(target, attributes, Basis.of_store(source), step, {} if fit is None else fit.arrays)


def _attributes(source: FeatureStore, storage: DenseStorage, step: npt.NDArray[np.float32] | None) -> StoreAttributes:
    own = stored_attributes(source.uri, source.attributes)
    old = own.configuration.storage
    new = StorageConfiguration(
        storage.dtype,
        storage.shard_rows,
        ZSTD_LEVEL,
        storage.error_floor if storage.dtype == "int8" else None,
        embedding=old.embedding,
        converted_from=f"{old.represent or 'dense'} {old.dtype}",
    )
    return StoreAttributes(
        configuration=replace(own.configuration, storage=new),
        versions=software_versions(),
        class_names=own.class_names,
        appended=own.appended,
        backbone_license=own.backbone_license,
        explained_variance=own.explained_variance,
        step_sha256=step_sha256(step),
    )


def _sample(source: FeatureStore) -> list[int]:
    """Rows with features, spread evenly over the store."""
    rows = source.rows_with_features
    if len(rows) == 0:
        raise JobError(f"{source.uri}: no row has features, there is nothing to convert")
    chosen: list[int] = rows[np.unique(np.linspace(0, len(rows) - 1, _SAMPLED).round().astype(int))].tolist()
    return chosen


def _steps(source: FeatureStore, sample: Sequence[int], storage: DenseStorage) -> npt.NDArray[np.float32] | None:
    """Quantization steps that suit some rows; None for float16."""
    total, count = Calibration.none(source.shape[0]), 0
    for row in sample:
        found = Calibration.of(torch.from_numpy(source.read(row)), storage.dtype, storage.error_floor)
        if found is not None:
            total, count = total.merged(found), count + 1
    return choose_steps(storage.dtype, total.mean_square / max(count, 1), storage.error_floor)


def _image_nbytes(source: FeatureStore, sample: Sequence[int], step: npt.NDArray[np.float32] | None) -> float:
    """Mean size of the chunks of some rows, and of their embeddings."""
    encoding = Encoding.of_steps(step, torch.device("cpu"))
    chunks = sum(len(_encoded(source, row, encoding, StageSeconds())[0]) for row in sample) / len(sample)
    return chunks + (source.embedding(sample).nbytes / len(sample) if source.has_embedding else 0)


def _encoded(source: FeatureStore, row: int, encoding: Encoding, seconds: StageSeconds) -> tuple[bytes, int]:
    """Chunk of a row, and how many of its values were clipped."""
    with seconds.stage("read"):
        values = torch.from_numpy(np.ascontiguousarray(source.read(row)))[None]
    with seconds.stage("encode"):
        codes = encoding.encode(values)
        return layout.encode_chunk(codes.codes[0].numpy()), int(codes.clipped.sum())


def _write(source: FeatureStore, target: Objects, features: FeatureLayout, digest: str, threads: int) -> None:
    """Write the shards that are missing, and finish the store."""
    done = finished_shards(target, digest)
    missing = sum(len(features.rows_of(shard)) for shard in range(features.shards) if shard not in done)
    check_space_for_rest(target, done.values(), missing, FREE_SOME)
    if missing:
        add(target, source.retired)  # a shard that is computed again must not bring rows back
    step = FeatureStore(target.uri, target.storage_options).step
    finish_with(target, features, done, lambda shard: _shard(source, target, features, shard, step, digest, threads))


def _shard(
    source: FeatureStore,
    target: Objects,
    features: FeatureLayout,
    shard: int,
    step: npt.NDArray[np.float32] | None,
    digest: str,
    threads: int,
) -> LedgerRecord:
    seconds, clipped = StageSeconds(), list[int]()
    rows, encoding = features.rows_of(shard), Encoding.of_steps(step, torch.device("cpu"))
    outcomes = outcomes_of(source.index, rows)

    def encoded(outcome: RowOutcome) -> bytes | None:
        if not outcome.ok:
            return None
        chunk, values = _encoded(source, outcome.row, encoding, seconds)
        clipped.append(values)
        return chunk

    chunks = list(in_order(encoded, outcomes, threads))
    companions = {layout.EMBEDDING: _embeddings(source, outcomes, features.shard_rows)} if source.has_embedding else {}
    made_by = {"host": socket.gethostname(), "pid": str(os.getpid()), "device": "cpu", "upsampled_by": "conversion"}
    facts: dict[str, Any] = {"configuration_hash": digest, "clipped": sum(clipped), "made_by": made_by}
    return write_shard(
        target, NewShard(shard, features.shard_rows, emptied(chunks), outcomes, facts, seconds, companions)
    )


def _embeddings(source: FeatureStore, outcomes: list[RowOutcome], shard_rows: int) -> bytes:
    ok = [outcome.row for outcome in outcomes if outcome.status == OK]
    found = source.embedding(ok)
    embeddings = np.full((len(outcomes), found.shape[1]), np.nan, np.float16)
    embeddings[[row - outcomes[0].row for row in ok]] = found
    return encode_embeddings(embeddings, shard_rows)
