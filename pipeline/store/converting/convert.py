"""Make a dense store of another one, without its images or backbone."""

import logging
import os
import socket
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from densefeat import layout
from densefeat.layout import ZSTD_LEVEL, FeatureLayout
from densefeat.rows.embeddings import encode_embeddings
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import in_order
from densefeat.store import FeatureStore
from kernels.quantization import Encoding
from pipeline.errors import JobError
from pipeline.features.pca import Basis
from pipeline.reporting.seconds import StageSeconds
from pipeline.reporting.software import software_versions
from pipeline.store.calibration import Calibration, choose_steps
from pipeline.store.converting.copying import outcomes_of
from pipeline.store.converting.places import finish_with, source_differences, store_at
from pipeline.store.fitted import stored_fit
from pipeline.store.layout import claim, complete_setup, step_sha256, stored_attributes
from pipeline.store.retirement import add
from pipeline.store.shard import NewShard, finished_shards, write_shard
from schemas.attributes import StoreAttributes
from schemas.configuration import StorageConfiguration
from schemas.index import OK, PENDING, REFERENCES, pending_index
from schemas.ledger import LedgerRecord, RowOutcome

__all__ = ["DenseStorage", "convert"]

logger = logging.getLogger(__name__)

_CALIBRATED = 32  # rows whose features set the quantization steps


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
            another one.
    """
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
    step = _steps(source, storage)
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


def _steps(source: FeatureStore, storage: DenseStorage) -> npt.NDArray[np.float32] | None:
    """Quantization steps from rows spread evenly over the store."""
    rows = source.rows_with_features
    if len(rows) == 0:
        raise JobError(f"{source.uri}: no row has features, there is nothing to convert")
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _CALIBRATED).round().astype(int))]
    total, count = Calibration.none(source.shape[0]), 0
    for features in (source.read(row) for row in chosen.tolist()):
        found = Calibration.of(torch.from_numpy(features), storage.dtype, storage.error_floor)
        if found is not None:
            total, count = total.merged(found), count + 1
    return choose_steps(storage.dtype, total.mean_square / max(count, 1), storage.error_floor)


def _write(source: FeatureStore, target: Objects, features: FeatureLayout, digest: str, threads: int) -> None:
    """Write the shards that are missing, and finish the store."""
    done = finished_shards(target, digest)
    if len(done) < features.shards:
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
        with seconds.stage("read"):
            values = torch.from_numpy(np.ascontiguousarray(source.read(outcome.row)))[None]
        with seconds.stage("encode"):
            codes = encoding.encode(values)
            clipped.append(int(codes.clipped.sum()))
            return layout.encode_chunk(codes.codes[0].numpy())

    chunks = list(in_order(encoded, outcomes, threads))
    companions = {layout.EMBEDDING: _embeddings(source, outcomes, features.shard_rows)} if source.has_embedding else {}
    made_by = {"host": socket.gethostname(), "pid": str(os.getpid()), "device": "cpu", "upsampled_by": "conversion"}
    facts: dict[str, Any] = {"configuration_hash": digest, "clipped": sum(clipped), "made_by": made_by}
    return write_shard(target, NewShard(shard, features.shard_rows, chunks, outcomes, facts, seconds, companions))


def _embeddings(source: FeatureStore, outcomes: list[RowOutcome], shard_rows: int) -> bytes:
    ok = [outcome.row for outcome in outcomes if outcome.status == OK]
    found = source.embedding(ok)
    embeddings = np.full((len(outcomes), found.shape[1]), np.nan, np.float16)
    embeddings[[row - outcomes[0].row for row in ok]] = found
    return encode_embeddings(embeddings, shard_rows)
