"""What a job says at its end: what was made, what could not be, and where the time went."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.index import OK
from schemas.ledger import LedgerRecord

_SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Report:
    """The outcome of a job.

    Attributes:
        store: its URI.
        shards: that the store has in all.
        own: those that were this job's to make.
        records: of all shards that are done, by this job or before.
        made: numbers of the shards that this job made.
        given_up: shard -> reason.
        explained_variance: share kept by PCA.
        seconds: wall time of this job.
        making_seconds: of that, the making of shards: without start, PCA and setup.
    """

    store: str
    shards: int
    own: range
    records: Sequence[LedgerRecord]
    made: Sequence[int]
    given_up: dict[int, str]
    explained_variance: float | None
    seconds: float
    making_seconds: float

    @property
    def rows_ok(self) -> int:
        """Rows with features."""
        return sum(record.rows_ok for record in self.records)

    @property
    def rows_failed(self) -> int:
        """Rows whose image could not be used."""
        return sum(record.rows_failed for record in self.records)

    @property
    def complete(self) -> bool:
        """Whether every shard of the store is done."""
        return len(self.records) == self.shards

    @property
    def failed_share(self) -> float:
        """Share of the rows that failed, 0 … 1."""
        return self.rows_failed / max(self.rows_ok + self.rows_failed, 1)

    def describe(self) -> str:
        """The report for a person."""
        nbytes = sum(record.nbytes for record in self.records)
        lines = [
            f"store       {self.store}: {len(self.records):,} of {self.shards:,} shards done"
            + (f", {len(self.made):,} by this job in {self.seconds:.1f} s" if self.made else ", none by this job"),
            f"rows        {self.rows_ok:,} with features, {self.rows_failed:,} failed",
            f"bytes       {nbytes / 1e6:,.1f} MB, {nbytes / 1e6 / max(self.rows_ok, 1):.2f} MB an image",
        ]
        if self.explained_variance is not None:
            lines.append(f"variance    {100 * self.explained_variance:.1f} % explained")
        lines += [*self._seconds(), *self._failures()]
        lines += [f"given up    shard {shard}: {reason}" for shard, reason in sorted(self.given_up.items())]
        done = {record.shard for record in self.records}
        if missing := len(set(self.own) - done):
            lines.append(f"not done    {missing:,} shards: run the same command with --resume to make them")
        if others := len(set(range(self.shards)) - set(self.own) - done):
            lines.append(f"not done    {others:,} shards that were not this job's (--shards)")
        return "\n".join(lines)

    @property
    def images_per_second(self) -> float:
        """Rows of this job's shards by the time their making took; 0 if it made none."""
        images = sum(record.rows_ok + record.rows_failed for record in self._own_records)
        return images / self.making_seconds if images else 0.0

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Busy seconds of this job's shards by stage, greatest first, summed over threads and workers."""
        total = Counter[str]()
        for record in self._own_records:
            total.update(record.seconds)
        return dict(total.most_common())

    @property
    def _own_records(self) -> list[LedgerRecord]:
        made = set(self.made)
        return [record for record in self.records if record.shard in made]

    def _seconds(self) -> list[str]:
        if not self.made:
            return []
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.stage_seconds.items())
        start = self.seconds - self.making_seconds
        made_on = sorted(
            {f"{r.made_by['device']}, upsampled by {r.made_by['upsampled_by']}" for r in self._own_records}
        )
        return [
            *(f"made on     {device}" for device in made_on),
            f"rate        {self.images_per_second:.1f} images/s, after {start:.1f} s of start and PCA",
            f"seconds     {stages} (busy, summed over threads and workers)",
        ]

    def _failures(self) -> list[str]:
        lines = []
        for record in self.records:
            if record.rows_failed:
                for outcome in record.outcomes.to_pylist():
                    if outcome["status"] != OK:
                        lines.append(f"failed      row {outcome['row']}: {outcome['status']}: {outcome['error']}")
        if len(lines) > _SHOWN_ERRORS:
            more = len(lines) - _SHOWN_ERRORS
            lines = [*lines[:_SHOWN_ERRORS], f"            … and {more:,} more: see status and error in index.parquet"]
        clipped = sum(record.clipped for record in self.records)
        return [*lines, f"clipped     {clipped:,} values beyond the int8 range"] if clipped else lines
