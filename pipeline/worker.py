"""One shard end to end: the loop that calls the stages. Knows nothing of Ray.

Several shards may be in the worker at once, each in a thread of its own: while one computes, the next reads and decodes
and the last is compressed and written. What a shard's bytes depend on (its rows, and how they are cut into batches)
does not depend on that, nor on rows that failed: their places in the batch stay.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from densefeat import layout
from densefeat.objects import Objects
from pipeline.batches import Batch
from pipeline.decode import Decoded
from pipeline.errors import ImageError
from pipeline.feature_worker import FeatureWorker, WorkerSpec
from pipeline.pca import Basis
from pipeline.quantize import quantize, steps
from pipeline.stage_seconds import StageSeconds
from pipeline.store import storage_explained, write_shard
from pipeline.upsample import build_upsampler
from schemas.config import UpsampleConfig
from schemas.index import OK
from schemas.ledger import LedgerRecord, RowOutcome


@dataclass(frozen=True)
class Encoding:
    """How features become what is stored: fixed for the whole store before its first shard.

    Attributes:
        basis: the PCA basis.
        step: [k] float32 for int8; None for float16.
        configuration_hash: of the store.
    """

    basis: Basis
    step: npt.NDArray[np.float32] | None
    configuration_hash: str


class ShardWorker(FeatureWorker):
    """All stages, built once, and the loop over a shard's images.

    Raises:
        JobError: as ``FeatureWorker``; or the upsampler is not the driver's.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        config = spec.config
        assert isinstance(config, UpsampleConfig)
        self.config = config
        upsampler = build_upsampler(config.upsampler, config.upsampler_weights, self.backbone.num_chs)
        self.upsampler = upsampler.to(self.device)
        self.check_identity("upsampler", upsampler.identity())
        self._encoders = ThreadPoolExecutor(spec.threads, "encode")
        self._folding: tuple[str, Tensor, Tensor] | None = None

    def sample_encoding(self, references: pa.Table, basis: Basis) -> tuple[npt.NDArray[np.float32] | None, float]:
        """Quantization steps [k] (None for float16) from a sample of images, and how many bytes one of them takes."""
        total, images, kept = np.zeros(len(basis.components)), 0, None
        for batch in self.loader.batches(references, StageSeconds()):
            usable = batch.usable_rows
            if usable.any():
                with self.computing:
                    high = self._upsampled(batch, basis, StageSeconds())[usable.to(self.device)]
                square = high.square().mean((2, 3), dtype=torch.float64).cpu().numpy()
                finite = np.isfinite(square).all(1)
                total, images = total + square[finite].sum(0), images + int(finite.sum())
                kept = high if kept is None else kept
        step = steps(total / max(images, 1), self.config.error_floor) if self.config.dtype == "int8" else None
        if kept is None:
            return step, 0.0
        codes, _, _ = quantize(kept, None if step is None else torch.tensor(step, device=self.device))
        return step, float(np.mean([len(layout.encode_chunk(image)) for image in codes.cpu().numpy()]))

    def make_shard(self, store: Objects, shard: int, references: pa.Table, encoding: Encoding) -> LedgerRecord:
        """Make a shard's features, write it, commit it.

        Args:
            store: where.
            shard: its number.
            references: its rows (``schemas.index.REFERENCES``).
            encoding: of the store.

        Raises:
            JobError: the storage refuses in a way that trying again will not mend.
        """
        seconds = StageSeconds()
        shard_rows = self.config.shard_rows
        outcomes: list[RowOutcome] = []
        chunks: list[Future[bytes] | None] = []
        clipped = 0
        for batch in self.loader.batches(references, seconds):
            codes, finite, batch_clipped = self._codes(batch, encoding, seconds)
            clipped += batch_clipped
            for i, decoded in enumerate(batch.decoded):
                outcome = _outcome(shard * shard_rows + len(outcomes), decoded, bool(finite[i]))
                outcomes.append(outcome)
                chunks.append(self._encoders.submit(_encode, codes[i], seconds) if outcome.ok else None)
        encoded = [None if chunk is None else chunk.result() for chunk in chunks]
        facts = {
            "configuration_hash": encoding.configuration_hash,
            "clipped": clipped,
            "made_by": self.made_by(),
        }
        with storage_explained(store.uri):
            return write_shard(store, shard, shard_rows, encoded, outcomes, seconds, facts)

    def _codes(
        self, batch: Batch, encoding: Encoding, seconds: StageSeconds
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], int]:
        """Stored values [B, k, H, W], which of them are finite [B], and how many values were clipped."""
        rows = len(batch.decoded)
        if not batch.usable_rows.any():
            self.images_done += rows
            return np.empty(rows), np.zeros(rows, bool), 0
        with seconds.stage("wait for device"):
            self.computing.acquire()
        try:
            high = self._upsampled(batch, encoding.basis, seconds)
            with seconds.stage("quantize"):
                step = None if encoding.step is None else torch.tensor(encoding.step, device=self.device)
                codes, finite, clipped = quantize(high, step)
                codes, finite = codes.cpu(), finite.cpu()
        finally:
            self.computing.release()
        self.images_done += rows
        return codes.numpy(), finite.numpy(), clipped

    def _upsampled(self, batch: Batch, basis: Basis, seconds: StageSeconds) -> Tensor:
        """High-resolution components [B, k, H, W]; the caller holds the device."""
        projection, offset = self._fold(basis)
        with torch.inference_mode():
            with seconds.stage("backbone"):
                pixels = batch.pixels.to(self.device)
                low = torch.einsum("bchw,ck->bkhw", self.backbone(pixels), projection)
                self._synchronize()
            with seconds.stage("upsample"):
                high: Tensor = self.upsampler(low, pixels, self.geometry.output_size)
                high = high.add_(offset[:, None, None])
                self._synchronize()
        return high

    def _fold(self, basis: Basis) -> tuple[Tensor, Tensor]:
        if self._folding is None or self._folding[0] != basis.digest:
            folding = self.upsampler.fold(*basis.tensors)
            self._folding = (basis.digest, folding.projection.to(self.device), folding.offset.to(self.device))
        return self._folding[1:]

    def _synchronize(self) -> None:
        """Let GPU work count for the stage that asked for it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_worker(spec: WorkerSpec) -> FeatureWorker:
    """The worker that the configuration calls for."""
    return ShardWorker(spec) if isinstance(spec.config, UpsampleConfig) else FeatureWorker(spec)


def _outcome(row: int, decoded: Decoded | ImageError, finite: bool) -> RowOutcome:
    if isinstance(decoded, ImageError):
        return RowOutcome(row, decoded.status, str(decoded))
    outcome = RowOutcome(row, OK, None, decoded.height, decoded.width, decoded.affine, decoded.valid_box)
    if not finite:
        outcome.status, outcome.error = "nonfinite", "its features contain NaN or infinity"
    return outcome


def _encode(codes: npt.NDArray[Any], seconds: StageSeconds) -> bytes:
    with seconds.stage("encode"):
        return layout.encode_chunk(codes)
