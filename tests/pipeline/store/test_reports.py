"""Reports of runs in the store: written by real jobs, known to all that look at the store as a whole."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from densefeat import FeatureStore, layout
from densefeat.conformance import problems
from densefeat.storage.objects import Objects
from jobs.command_line import DONE, FAILED
from jobs.verify_store import VerifyConfig, verify
from pipeline.run.job import carry_out
from pipeline.run.planning.plan import make_plan
from pipeline.store.layout import delete_store, foreign_keys
from tests.helpers.photographs import encode, random_images
from tests.helpers.upsample_jobs import config

ROWS, BROKEN = 10, 3


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for i, pixels in enumerate(random_images(ROWS, (70, 80))):
        (folder / f"{i:02}.png").write_bytes(encode(Image.fromarray(pixels.permute(1, 2, 0).numpy()), "PNG"))
    (folder / f"{BROKEN:02}.png").write_bytes((folder / f"{BROKEN:02}.png").read_bytes()[:500])
    return folder


def run(photographs: Path, store: Path, **options: Any) -> None:
    carry_out(make_plan(config(photographs, store, max_failed_share=0.5, **options)), time.monotonic())


def reports(store: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(store.glob("_reports/*.json"))]


def test_every_run_that_did_something_keeps_one(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(photographs, store, shards="0:1")
    (first,) = reports(store)
    assert first["shards"] == {"total": 3, "assigned": [0, 1], "done": 1, "made": 1, "given_up": {}}
    assert first["rows"] == {"ok": 3, "failed": {"corrupt": 1}}
    assert first["options"]["components"] == 8
    assert first["options"]["images"] == str(photographs)
    run(photographs, store, resume=True)
    (second,) = [report for report in reports(store) if report != first]
    assert second["shards"] == {"total": 3, "assigned": [0, 3], "done": 3, "made": 2, "given_up": {}}
    assert second["rows"] == {"ok": ROWS - 1, "failed": {"corrupt": 1}}
    sizes = [Objects(str(store)).size(layout.shard_key(shard)) or 0 for shard in range(3)]
    assert first["nbytes"] == {"store": sizes[0], "made": sizes[0]}
    assert second["nbytes"] == {"store": sum(sizes), "made": sum(sizes[1:])}
    assert second["stage_seconds"]["decode"] > 0
    assert second["images_per_second"] > 0
    assert [machine["shards"] for machine in second["made_on"]] == [2]
    run(photographs, store, resume=True)  # nothing is left
    assert len(reports(store)) == 2


def test_whatever_looks_at_the_whole_store_knows_them(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(photographs, store)
    assert len(reports(store)) == 1
    assert problems(FeatureStore(str(store))) == []
    assert verify(VerifyConfig(store=str(store))) == DONE
    assert foreign_keys(Objects(str(store))) == []
    delete_store(Objects(str(store)))
    assert [path for path in store.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("20260101T000000Z-0123abcd.json", b"{", "is damaged.*delete it"),
        ("20260101T000000Z-0123abcd.json", b"{}", "is not a report: it has no rows, shards"),
        ("20260101T000000Z-0123abcd.json", b"[]", "is not a report"),
        ("mine.json", b"{}", "mine.json is not the name of a report"),
    ],
)
def test_damaged_ones_are_named(
    name: str, content: bytes, words: str, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    run(photographs, store)
    (store / "_reports" / name).write_bytes(content)
    (problem,) = problems(FeatureStore(str(store)))
    assert re.search(words, problem)
    assert verify(VerifyConfig(store=str(store))) == FAILED
    assert problem in caplog.text


def test_a_run_is_done_even_if_its_report_cannot_be_kept(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    plan = make_plan(config(photographs, store, max_failed_share=0.5))
    store.mkdir(exist_ok=True)
    (store / "_reports").write_bytes(b"a file where the folder would be")
    carry_out(plan, time.monotonic())
    assert "the report of this run could not be kept" in caplog.text
    assert len(FeatureStore(str(store)).rows_with_features) == ROWS - 1
