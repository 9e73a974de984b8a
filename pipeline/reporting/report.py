"""The report at the end of a job: what was written, what failed, and where the time went."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from densefeat.rows.retired import RETIRED
from pipeline.reporting.commands import this_python
from pipeline.reporting.software import software_versions
from schemas.index import OK
from schemas.ledger import LedgerRecord

_SHOWN_OF_A_REASON = 3


@dataclass(frozen=True)
class Report:
    """The outcome of a job.

    Attributes:
        store: URI of the store.
        shards: total number of shards in the store.
        own: shards assigned to this job.
        records: of all finished shards, by this job or earlier ones.
        made: numbers of the shards that this job wrote.
        given_up: shard -> reason.
        explained_variance: share kept by PCA, 0 … 1.
        seconds: wall time of this job.
        making_seconds: the part of it spent on shards, without startup, PCA and setup.
        keys: of all rows of the store.
        max_failed_share: share of the rows that may fail, 0 … 1.
        options: of the job, by name.
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
    keys: pa.ChunkedArray
    max_failed_share: float
    options: Mapping[str, Any] = field(default_factory=dict)

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
        """Share of the rows that failed, 0 … 1; rows that were retired before a conversion or merge did not fail."""
        retired = pc.sum(pc.equal(self._failed_rows()["status"], RETIRED)).as_py() or 0
        return (self.rows_failed - retired) / max(self.rows_ok + self.rows_failed, 1)

    @property
    def too_many_failed(self) -> bool:
        """Whether more rows failed than allowed."""
        return self.failed_share > self.max_failed_share

    def to_dict(self) -> dict[str, Any]:
        """The report as it is stored, as JSON: what this run did, and what the store then holds."""
        own, statuses = self._own_records, Counter[str](self._failed_rows()["status"].to_pylist())
        return {
            "rows": {"ok": self.rows_ok, "failed": dict(statuses.most_common())},
            "shards": {
                "total": self.shards,
                "assigned": [self.own.start, self.own.stop],
                "done": len(self.records),
                "made": len(self.made),
                "given_up": {str(shard): reason for shard, reason in sorted(self.given_up.items())},
            },
            "nbytes": {"store": _nbytes(self.records), "made": _nbytes(own)},
            "seconds": {"total": round(self.seconds, 3), "making": round(self.making_seconds, 3)},
            "images_per_second": round(self.images_per_second, 3),
            "stage_seconds": {stage: round(seconds, 3) for stage, seconds in self.stage_seconds.items()},
            "clipped": sum(record.clipped for record in self.records),
            "explained_variance": self.explained_variance,
            "made_on": _machines(own),
            "options": dict(self.options),
            "versions": software_versions(),
        }

    def describe(self) -> str:
        """The report as text."""
        nbytes = _nbytes(self.records)
        lines = [
            f"store       {self.store}: {len(self.records):,} of {self.shards:,} shards done"
            + (f", {len(self.made):,} by this job in {self.seconds:.1f} s" if self.made else ", none by this job"),
            f"rows        {self.rows_ok:,} with features, {self.rows_failed:,} failed",
            f"bytes       {nbytes / 1e6:,.1f} MB, {nbytes / 1e6 / max(self.rows_ok, 1):.2f} MB per image",
        ]
        if self.explained_variance is not None:
            lines.append(f"variance    {100 * self.explained_variance:.1f}% explained")
        lines += [*self._seconds(), *self._failures()]
        lines += [f"given up    shard {shard}: {reason}" for shard, reason in sorted(self.given_up.items())]
        done = {record.shard for record in self.records}
        if missing := len(set(self.own) - done):
            lines.append(f"not done    {missing:,} shards: run the same command with --resume to compute them")
        if others := len(set(range(self.shards)) - set(self.own) - done):
            lines.append(f"not done    {others:,} shards not assigned to this job (--shards)")
        if self.complete and self.rows_ok:
            lines += self._next()
        return "\n".join(lines)

    def _next(self) -> list[str]:
        """Commands for the finished store."""
        python, store = this_python(), shlex.quote(self.store)
        outcomes = next(record.outcomes for record in self.records if record.rows_ok)
        row = outcomes["row"][outcomes["status"].to_pylist().index(OK)]
        return [
            f"read        from densefeat import FeatureStore; FeatureStore({self.store!r}).read({row})",
            f"look        {python} -m densefeat.page {store}",
            f"picture     {python} -m jobs.show_features --store {store}",
            f"verify      {python} -m jobs.verify_store --store {store}",
        ]

    @property
    def images_per_second(self) -> float:
        """Rows of this job's shards divided by ``making_seconds``; 0 if it wrote none."""
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
        made_on = sorted({_made_on(record) for record in self._own_records})
        return [
            *(f"made on     {device}" for device in made_on),
            f"rate        {self.images_per_second:.1f} images/s, excluding {start:.1f} s of startup and PCA",
            f"seconds     {stages} (busy, summed over threads and workers)",
        ]

    def _failures(self) -> list[str]:
        """Failed rows by reason, with the keys of the first few of each."""
        lines = []
        failed = self._failed_rows()
        for status, count in sorted(
            Counter(failed["status"].to_pylist()).items(), key=lambda item: (-item[1], item[0])
        ):
            lines.append(f"failed      {count:,} {status}, {'all' if count <= _SHOWN_OF_A_REASON else 'for example'}:")
            of_status = failed.filter(pc.equal(failed["status"], status)).slice(0, _SHOWN_OF_A_REASON)
            for outcome in of_status.to_pylist():
                lines.append(f"            {self.keys[outcome['row']]} (row {outcome['row']}): {outcome['error']}")
        if lines:
            lines.append("            the status and error of every row are in index.parquet")
        if self.too_many_failed:
            lines.append(
                f"            {100 * self.failed_share:.3g}% of the rows failed, more than --max-failed-share "
                f"{self.max_failed_share:g} allows: the exit code is 1. Set a greater share to accept this"
            )
        clipped = sum(record.clipped for record in self.records)
        return [*lines, f"clipped     {clipped:,} values beyond the int8 range"] if clipped else lines

    def _failed_rows(self) -> pa.Table:
        columns = ["row", "status", "error"]
        tables = [record.outcomes.select(columns) for record in self.records if record.rows_failed]
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in columns})
        outcomes = pa.concat_tables(tables)
        return outcomes.filter(pc.not_equal(outcomes["status"], OK))


def _nbytes(records: Sequence[LedgerRecord]) -> int:
    return sum(record.total_nbytes for record in records)


def _machines(records: Sequence[LedgerRecord]) -> list[dict[str, Any]]:
    """What shards were made on, without the number of the process, and how many on each; most first."""
    machines = Counter(
        tuple((name, value) for name, value in sorted(record.made_by.items()) if name != "pid") for record in records
    )
    return [{**dict(machine), "shards": shards} for machine, shards in machines.most_common()]


def _made_on(record: LedgerRecord) -> str:
    """The device of a shard, and the implementation that upsampled it, where its name says more."""
    device, implementation = record.made_by["device"], record.made_by["upsampled_by"]
    return device if implementation == device else f"{device}, upsampled by {implementation}"
