"""What a job says at its end."""

import json

import pyarrow as pa
import pytest

from pipeline.reporting.report import Report
from schemas.ledger import LedgerRecord, RowOutcome, outcomes_table


def report(statuses: list[str], max_failed_share: float = 0.01, given_up: dict[int, str] | None = None) -> Report:
    outcomes = [
        RowOutcome(row, status, None if status == "ok" else f"reason {row}") for row, status in enumerate(statuses)
    ]
    ok = statuses.count("ok")
    made_by = {"device": "cpu", "upsampled_by": "cpu"}
    record = LedgerRecord(
        0, ok, len(statuses) - ok, 1000, "", "", 0, {"decode": 1.0}, made_by, outcomes=outcomes_table(outcomes)
    )
    keys = pa.chunked_array([[f"class/{row}.jpg" for row in range(len(statuses))]])
    shards = 1 + len(given_up or {})
    return Report("store", shards, range(shards), [record], [0], given_up or {}, 0.9, 2.0, 1.0, keys, max_failed_share)


def test_failures_are_grouped_by_reason_and_named_by_key() -> None:
    text = report(["ok"] * 5 + ["corrupt"] * 7 + ["too_small"], max_failed_share=0.7).describe().splitlines()
    first = text.index("failed      7 corrupt, for example:")
    assert text[first + 1 : first + 7] == [
        "            class/5.jpg (row 5): reason 5",
        "            class/6.jpg (row 6): reason 6",
        "            class/7.jpg (row 7): reason 7",
        "failed      1 too_small, all:",
        "            class/12.jpg (row 12): reason 12",
        "            the status and error of every row are in index.parquet",
    ]
    assert "--max-failed-share" not in "\n".join(text)


def test_the_row_that_it_reads_has_features() -> None:
    assert "FeatureStore('store').read(2)" in report(["corrupt", "retired", "ok", "ok"]).describe()
    assert "FeatureStore" not in report(["corrupt"]).describe()


def test_an_exit_code_of_1_says_why() -> None:
    failed = report(["ok", "corrupt", "ok", "ok"])
    assert failed.too_many_failed
    assert "25% of the rows failed, more than --max-failed-share 0.01 allows: the exit code is 1" in failed.describe()
    assert not report(["ok"] * 3).too_many_failed
    assert not report(["ok", "retired"]).too_many_failed
    assert report(["ok", "retired", "corrupt"]).failed_share == pytest.approx(1 / 3)
    given_up = report(["ok"], given_up={1: "tried 3 times; the last time: EIO"}).describe()
    assert "given up    shard 1: tried 3 times; the last time: EIO" in given_up
    assert "not done    1 shards: run the same command with --resume to compute them" in given_up


def test_as_json_it_says_the_same() -> None:
    one = report(["ok"] * 5 + ["corrupt"] * 7 + ["too_small"], given_up={1: "tried 3 times; the last time: EIO"})
    found = json.loads(json.dumps(one.to_dict()))
    assert found["rows"] == {"ok": 5, "failed": {"corrupt": 7, "too_small": 1}}
    assert found["shards"] == {
        "total": 2, "assigned": [0, 2], "done": 1, "made": 1, "given_up": {"1": "tried 3 times; the last time: EIO"},
    }  # fmt: skip
    assert found["nbytes"] == {"store": 1000, "made": 1000}
    assert found["seconds"] == {"total": 2.0, "making": 1.0}
    assert found["images_per_second"] == 13.0
    assert found["stage_seconds"] == {"decode": 1.0}
    assert found["made_on"] == [{"device": "cpu", "upsampled_by": "cpu", "shards": 1}]
    assert found["versions"]["python"]
