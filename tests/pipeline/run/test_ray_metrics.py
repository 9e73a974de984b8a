"""Metrics of a job, as Ray exports them to Prometheus, against the ledger."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.photographs import write_random_images

ROOT = Path(__file__).parents[3]

# The real job on Ray. Its workers are kept until their metrics are exported: a killed one takes the last with it.
# Shards that are asked for again were made before: they must not be counted twice, by whichever worker.
JOB = """
import json, sys, threading, time, urllib.request
import ray
from densefeat.storage.objects import Objects
from pipeline.run.job import open_workers
from pipeline.run.make_shards import make_shards
from pipeline.run.planning.plan import make_plan
from pipeline.run.preparation.prepare import prepare
from tests.helpers.upsample_jobs import config

scrapes = []

def scrape():
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while True:
        scrapes.append(urllib.request.urlopen(address, timeout=10).read().decode())
        time.sleep(0.5)

if __name__ == "__main__":
    images, store = sys.argv[1:]
    plan = make_plan(config(images, store, workers=2))
    objects = Objects(store)
    with open_workers(plan.spec, plan.stages, plan.config, attempts=3, stall_timeout_s=300) as workers:
        encoding = prepare(plan, objects, workers)
        threading.Thread(target=scrape, daemon=True).start()
        for _ in range(2):
            make_shards(plan, objects, workers, encoding, list(plan.shards), [])
        before = len(scrapes)
        while len(scrapes) < before + 8:  # several exports
            time.sleep(0.5)
        print(json.dumps(scrapes))
"""


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each of our samples."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(text)
    return [(s.name, s.labels, s.value) for family in families for s in family.samples if "densefeat" in s.name]


def summed(found: list[tuple[str, dict[str, str], float]], name: str, by: str | None = None) -> Any:
    """Total of a metric over workers; with ``by``, for each value of that label."""
    totals = Counter[str]()
    for metric, labels, value in found:
        if metric == name:
            totals[labels[by] if by else ""] += value
    return dict(totals) if by else totals[""]


@pytest.mark.slow
def test_prometheus_has_the_numbers_of_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from densefeat.storage.objects import Objects
    from densefeat.store import FeatureStore
    from pipeline.run.ray.metrics import METRICS
    from pipeline.store.shard import finished_shards

    images, store = tmp_path / "images", tmp_path / "store"
    write_random_images(images, 14)
    (images / "broken.jpg").write_bytes(b"no image")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "job.py").write_text(JOB)
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", images, store], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    scrapes = [samples(text) for text in json.loads(done.stdout.splitlines()[-1])]
    found = scrapes[-1]
    hash_ = FeatureStore(str(store)).attributes["configuration_hash"]
    records = list(finished_shards(Objects(str(store)), hash_).values())
    assert len(records) == 4
    seconds = Counter[str]()
    for record in records:
        seconds.update({stage: value for stage, value in record.seconds.items() if value})
    assert summed(found, "ray_densefeat_shards_made_total") == len(records)
    assert summed(found, "ray_densefeat_images_total", "status") == {"ok": 14, "unsupported": 1}
    assert summed(found, "ray_densefeat_images_computed_total") >= 15
    assert summed(found, "ray_densefeat_bytes_written_total") == sum(record.total_nbytes for record in records)
    assert summed(found, "ray_densefeat_stage_seconds_total", "stage") == pytest.approx(dict(seconds))
    # Gauges are forgotten when the job does not set them any more.
    assert {"done": 4, "left": 0, "given up": 0} in [summed(s, "ray_densefeat_shards", "state") for s in scrapes]
    assert max(summed(s, "ray_densefeat_workers_wanted") for s in scrapes) == 2
    assert max(summed(s, "ray_densefeat_workers_ready") for s in scrapes) == 2
    of_gpus = {"ray_densefeat_images_decoded_elsewhere_total"}  # workers on CPUs send none elsewhere
    assert {name for s in scrapes for name, _, _ in s} == {metric.exported for metric in METRICS} - of_gpus


def test_a_job_in_its_own_process_does_not_import_ray(tmp_path: Path) -> None:
    write_random_images(tmp_path / "images", 5)
    code = (
        "import sys, time\n"
        "from pipeline.run.job import carry_out\n"
        "from pipeline.run.planning.plan import make_plan\n"
        "from tests.helpers.upsample_jobs import config\n"
        "report = carry_out(make_plan(config(*sys.argv[1:])), time.monotonic())\n"
        "print(report.rows_ok, 'ray' in sys.modules)\n"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "images", tmp_path / "store"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["5", "False"], done.stderr
