"""Process one shard end to end: the loop that calls the stages. Independent of Ray.

A worker may have several shards at once, each in its own thread: while one computes, the next one is read and decoded,
and the previous one is compressed and written. The bytes of a shard depend only on its rows and how they are split into
batches. They do not depend on the other shards, nor on rows that failed, which keep their places in the batch.
"""

import itertools
import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from densefeat import layout
from densefeat.storage.guidance import encode_guidance
from densefeat.storage.objects import Objects
from densefeat.storage.parallel import results_of
from kernels.quantization import Encoding
from pipeline.errors import ImageError
from pipeline.features.pca import Basis
from pipeline.images.batches import Batch
from pipeline.images.decoding.decode import Decoded
from pipeline.images.sample import Gathered, Part
from pipeline.io.storage import storage_explained
from pipeline.reporting.seconds import StageSeconds
from pipeline.run.feature_worker import FeatureWorker, WorkerSpec
from pipeline.run.recipe import Stages, UpsampleRecipe
from pipeline.store.appending.grown_shard import done_or_kept
from pipeline.store.calibration import Calibration
from pipeline.store.shard import NewShard
from pipeline.upsamplers.fitting import Fitting, UpsamplerFit
from pipeline.upsamplers.interface import Projected, Stored, with_nonfinite
from schemas.index import OK
from schemas.ledger import LedgerRecord, RowOutcome

logger = logging.getLogger(__name__)

_UNUSABLE = "it has one colour, or features that do not vary, or contain NaN or infinity"
_COPIES_IN_UPSAMPLING = 3  # of a batch's values: floats of two steps, and the codes being encoded


@dataclass(frozen=True)
class StoreEncoding:
    """Encoding from features to stored values: the same for the whole store, fixed before its first shard.

    Attributes:
        basis: the PCA basis.
        step: quantization steps, [k] float32, for int8; None for float16.
        configuration_hash: hash of the store's configuration.
        fit: what the upsampler was fitted to be; None for an upsampler that is not fitted to images.
    """

    basis: Basis
    step: npt.NDArray[np.float32] | None
    configuration_hash: str
    fit: UpsamplerFit | None = None


@dataclass(frozen=True)
class _Computed:
    """Stored values [B, k, H, W], numbers of clipped values and failures by image, and embeddings [B, D] float16."""

    codes: npt.NDArray[Any]
    clipped: list[int]
    failures: dict[int, ImageError]
    embedding: npt.NDArray[np.float16] | None


class ShardWorker(FeatureWorker):
    """All stages, built once, and the loop over a shard's images. Arguments and errors as for ``FeatureWorker``."""

    def __init__(self, spec: WorkerSpec, stages: Stages | None = None) -> None:
        assert isinstance(spec.recipe, UpsampleRecipe)
        self.recipe = spec.recipe
        super().__init__(spec, stages)
        assert self.stages.upsampler is not None
        self.upsampler = self.stages.upsampler
        self._upsampled_by = self.upsampler.explain(self.device)
        level = logging.WARNING if self._upsampled_by.startswith("reference") else logging.DEBUG
        message = "--upsampler %s runs on %s with the implementation %s"
        logger.log(level, message, self.recipe.upsampler, self.device, self._upsampled_by)
        self._encoders = ThreadPoolExecutor(spec.threads, "encode")
        self._with_basis: tuple[tuple[str, str | None], Projected] | None = None

    def fitting_sample(self, references: pa.Table, basis: Basis) -> Part[Gathered]:
        """What the fit of the upsampler must know of the referenced images, in components of the basis."""
        fitting, total = self._fitting(), Part(Gathered(()), 0, None)
        projection = tuple(tensor.to(self.device) for tensor in basis.tensors)
        for batch in self.loader.batches(references, StageSeconds()):
            sample, error = None, next((str(image) for image in batch.decoded if not isinstance(image, Decoded)), None)
            if batch.usable_rows.any():
                with self.computing, torch.inference_mode():
                    sample = fitting.sample(batch.pixels[batch.usable_rows].to(self.device), *projection)
            if sample is None:
                total = total.merged(Part(Gathered(()), 0, error or _UNUSABLE))
            else:
                total = total.merged(Part(Gathered((sample,)), len(sample), error))
            self.images_done += len(batch.decoded)
        return total

    def fitting_trial(self, sample: Any, trial: Any) -> Any:
        """Result of a trial of the upsampler's fit."""
        with self.computing, torch.inference_mode():
            result = self._fitting().trial(sample, trial, self.device)
        self.images_done += 1
        return result

    def _fitting(self) -> Fitting:
        fitting = self.upsampler.fitting()
        assert fitting is not None
        return fitting

    def calibrate(self, references: pa.Table, basis: Basis, fit: UpsamplerFit | None) -> Part[Calibration]:
        """Measure the scale of the upsampled features, one image at a time: an upsampler may take minutes per image."""
        total = Part(Calibration.none(len(basis.components)), 0, None)
        for batch in self.loader.batches(references, StageSeconds()):
            for i, decoded in enumerate(batch.decoded):
                if isinstance(decoded, Decoded):
                    total = total.merged(self._calibrate_image(batch.pixels[i : i + 1], basis, fit))
                else:
                    total = total.merged(Part(Calibration.none(len(basis.components)), 0, str(decoded)))
                self.images_done += 1
        return total

    def _calibrate_image(self, pixels: Tensor, basis: Basis, fit: UpsamplerFit | None) -> Part[Calibration]:
        with self.computing, torch.inference_mode():
            pixels = pixels.to(self.device)
            features = self.backbone(pixels)
            values, failures = self._values(features, pixels, self._projected(basis, fit))
            guidance = len(_encode_guidance(pixels[0].cpu(), StageSeconds())) if self.recipe.guided else 0
            calibration = Calibration.of(values[0], self.recipe.dtype, self.recipe.error_floor, guidance)
        if calibration is None:
            reason = str(failures.get(0, "its features contain NaN or infinity"))
            return Part(Calibration.none(len(basis.components)), 0, reason)
        return Part(calibration, 1, None)

    def try_rows(self, references: pa.Table, encoding: StoreEncoding) -> None:
        """Compute and encode rows as for a shard, and keep nothing: to find those that make a worker fail."""
        seconds = StageSeconds()
        for batch in self.loader.batches(references, seconds):
            codes, failures, _ = self._codes(batch, encoding, seconds, [])
            for i, decoded in enumerate(batch.decoded):
                if isinstance(decoded, Decoded) and i not in failures:
                    _encode(codes[i], seconds)

    def make_shard(
        self,
        store: Objects,
        shard: int,
        references: pa.Table,
        encoding: StoreEncoding,
        crashed: Mapping[int, str] = MappingProxyType({}),
    ) -> LedgerRecord:
        """Compute, write and commit a shard; of one to which rows were appended, only these.

        Args:
            store: the store.
            shard: shard number.
            references: rows of the shard (``schemas.index.REFERENCES``).
            encoding: the store's encoding.
            crashed: position in the shard -> reason, of rows that made workers fail; they become failed rows.

        Returns:
            The committed record; that of another job, if it was first.

        Raises:
            JobError: the storage refuses permanently, so a retry cannot help; or as in ``write_shard``.
        """
        seconds, shard_rows = StageSeconds(), self.recipe.shard_rows
        kept = done_or_kept(store, shard, encoding.configuration_hash, references.num_rows, shard_rows)
        if isinstance(kept, LedgerRecord):  # by another job meanwhile
            self.images_done += references.num_rows
            return kept
        first = len(kept)
        self.images_done += first
        crashed = {position - first: reason for position, reason in crashed.items() if position >= first}
        outcomes: list[RowOutcome] = []
        chunks: list[Future[bytes] | None] = []
        guidance: list[Future[bytes] | None] = []
        clipped = 0
        embeddings: list[npt.NDArray[np.float16]] = []
        for batch in self.loader.batches(references.slice(first), seconds, crashed):
            codes, failures, batch_clipped = self._codes(batch, encoding, seconds, embeddings)
            clipped += batch_clipped
            for i, decoded in enumerate(batch.decoded):
                outcome = _outcome(shard * shard_rows + first + len(outcomes), decoded, failures.get(i))
                outcomes.append(outcome)
                chunks.append(self._encoders.submit(_encode, codes[i], seconds) if outcome.ok else None)
                if self.recipe.guided:  # of all that decode: a failure on another machine must leave no gap
                    known = isinstance(decoded, Decoded)
                    encode = self._encoders.submit
                    guidance.append(encode(_encode_guidance, batch.pixels[i], seconds) if known else None)
        companions = {}
        if self.recipe.guided:
            companions[layout.GUIDANCE] = kept.guidance_object(results_of(guidance), shard_rows)
        if self.recipe.embedding is not None:
            companions[layout.EMBEDDING] = kept.embedding_object(embeddings, shard_rows)
        facts = {"configuration_hash": encoding.configuration_hash, "clipped": clipped, "made_by": self.made_by()}
        with storage_explained(store.uri):
            new = NewShard(shard, shard_rows, results_of(chunks), outcomes, facts, seconds, companions)
            return kept.write(store, new)

    def _codes(
        self,
        batch: Batch,
        encoding: StoreEncoding,
        seconds: StageSeconds,
        embeddings: list[npt.NDArray[np.float16]],
    ) -> tuple[npt.NDArray[Any], dict[int, ImageError], int]:
        """Stored values [B, k, H, W], failures by image, and the number of clipped values in the other images.

        The batch's embeddings [B, D], if the store has them, are appended to ``embeddings``.

        If no row of the batch is usable, the first result is an uninitialized array [B], which is not to be read.
        """
        rows = len(batch.decoded)
        if not batch.usable_rows.any():
            self.images_done += rows
            embeddings.append(np.full((rows, self.recipe.embedding or 0), np.nan, np.float16))
            return np.empty(rows), {}, 0
        with seconds.stage("wait for device"):
            self.computing.acquire()
        try:
            with torch.inference_mode():
                parts = self.in_parts_that_fit(batch, lambda part: self._computed(part, encoding, seconds))
        finally:
            self.computing.release()
        failures: dict[int, ImageError] = {}
        clipped = 0
        for first, part in zip(itertools.accumulate((len(p.codes) for p in parts), initial=0), parts, strict=False):
            failures |= {first + i: error for i, error in part.failures.items()}
            clipped += sum(n for i, n in enumerate(part.clipped) if i not in part.failures)
        if self.recipe.embedding is not None:
            halves = np.concatenate([part.embedding for part in parts if part.embedding is not None])
            halves[~batch.usable_rows.numpy()] = np.nan
            embeddings.append(halves)
        self.images_done += rows
        codes = parts[0].codes if len(parts) == 1 else np.concatenate([part.codes for part in parts])
        return codes, failures, clipped

    def _computed(self, batch: Batch, encoding: StoreEncoding, seconds: StageSeconds) -> _Computed:
        """What is stored of a batch, on the CPU."""
        features, pixels, embedding = self._features(batch, seconds)
        stored = self._stored(features, pixels, encoding, seconds)
        return _Computed(
            stored.values.codes.cpu().numpy(),
            stored.values.clipped.tolist(),
            stored.failures,
            None if embedding is None else embedding.half().numpy(),
        )

    def _features(self, batch: Batch, seconds: StageSeconds) -> tuple[Tensor, Tensor, Tensor | None]:
        """Low-resolution features [B, C, h, w] and their pixels, on the device; and embeddings [B, D] on the CPU."""
        embedding = None
        with seconds.stage("backbone"):
            pixels = batch.pixels.to(self.device)
            if self.recipe.embedding is None:
                features = self.backbone(pixels)
            else:
                features, on_device = self.backbone.with_embedding(pixels)
                embedding = on_device.cpu()
            self._synchronize()
        return features, pixels, embedding

    def _stored(self, features: Tensor, pixels: Tensor, encoding: StoreEncoding, seconds: StageSeconds) -> Stored:
        """Upsample, up to the last step for a compact store, and encode low-resolution features."""
        upsampler, size = self._projected(encoding.basis, encoding.fit), self.geometry.output_size
        stored_size = self.recipe.stored_size
        into = Encoding.of_steps(encoding.step, self.device)
        with seconds.stage("upsample"):
            if self.recipe.represent == "compact":
                values, failures = upsampler.before_last_step(features, pixels, size)
                stored = with_nonfinite(into.encode(values), failures)
            else:
                stored = upsampler.encode(features, pixels, stored_size, into)
            self._synchronize()
        return stored

    def _values(self, features: Tensor, pixels: Tensor, upsampler: Projected) -> tuple[Tensor, dict[int, ImageError]]:
        """The values to be stored [B, k, …] before they are encoded, and the images that failed, not finite in them."""
        if self.recipe.represent == "compact":
            return upsampler.before_last_step(features, pixels, self.geometry.output_size)
        arguments = features, pixels, self.recipe.stored_size
        high: Tensor = upsampler(*arguments)
        return high, {} if high.isfinite().all() else upsampler.encode(*arguments, Encoding(None)).failures

    def _projected(self, basis: Basis, fit: UpsamplerFit | None) -> Projected:
        """The upsampler, fitted, with the basis folded in; call it only while holding ``computing``."""
        key = (basis.digest, None if fit is None else fit.digest)
        if self._with_basis is None or self._with_basis[0] != key:
            upsampler = self.upsampler if fit is None else self.upsampler.fitted(fit)
            self._with_basis = key, upsampler.with_basis(*basis.tensors).to(self.device)
        return self._with_basis[1]

    def _waiting_nbytes(self) -> int:
        """As in ``FeatureWorker``, plus a shard's chunks (as if uncompressed) and the codes of a batch."""
        rows = self.recipe.shard_rows + self.batch_size
        return super()._waiting_nbytes() + rows * self._image_values() * np.dtype(self.recipe.dtype).itemsize

    def _task_nbytes(self) -> int:
        """As in ``FeatureWorker``, plus several float32 copies of a batch."""
        return super()._task_nbytes() + self.batch_size * self._image_values() * 4 * _COPIES_IN_UPSAMPLING

    def _image_values(self) -> int:
        return self.recipe.components * math.prod(self.recipe.stored_size)

    def made_by(self) -> dict[str, str]:
        """As ``FeatureWorker.made_by``, and the implementation of the upsampler."""
        return {**super().made_by(), "upsampled_by": self._upsampled_by.split(" (")[0]}

    def _synchronize(self) -> None:
        """Wait for the GPU, so that its time counts for the stage that started the work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_worker(spec: WorkerSpec, stages: Stages | None = None) -> FeatureWorker:
    """Build the worker that the recipe needs."""
    kind = ShardWorker if isinstance(spec.recipe, UpsampleRecipe) else FeatureWorker
    return kind(spec, stages)


def _outcome(row: int, decoded: Decoded | ImageError, failure: ImageError | None) -> RowOutcome:
    if isinstance(decoded, ImageError):
        return RowOutcome(row, decoded.status, str(decoded))
    outcome = RowOutcome(row, OK, None, decoded.height, decoded.width, decoded.affine, decoded.valid_box)
    if failure is not None:
        outcome.status, outcome.error = failure.status, str(failure)
    return outcome


def _encode_guidance(pixels: Tensor, seconds: StageSeconds) -> bytes:
    """Encode the pixels of an image [3, H, W] uint8 as its guidance."""
    with seconds.stage("encode"):
        return encode_guidance(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def _encode(codes: npt.NDArray[Any], seconds: StageSeconds) -> bytes:
    with seconds.stage("encode"):
        return layout.encode_chunk(codes)
