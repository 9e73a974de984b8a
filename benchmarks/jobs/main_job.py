"""Claim: the cost of the main job on a small machine, with memory independent of the number of images.

    python -m benchmarks.jobs.main_job --images PHOTOS --lite0 FILE --vit FILE
    python -m benchmarks.jobs.main_job --images PHOTOS --vit FILE --vit-pooling FILE --picture fits.png

With a pooling model from jobs/fit_pooling.py, the job runs with ``--upsampler multiview`` instead. Each run is the job
as a user starts it (in a separate process, on Ray, with the default layers), on 200 photographs and on five copies of
them. Memory is the sum of the proportional set sizes (PSS) of all its processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import rows
from jobs.show_features import ShowConfig, show

K, SIZE = 64, "224"
POLL_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with photographs")
    parser.add_argument("--lite0", type=Path, help="weights of timm's tf_efficientnet_lite0")
    parser.add_argument("--vit", type=Path, help="weights of timm's vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--vit-pooling", type=Path, help="pooling model, for --upsampler multiview")
    parser.add_argument("--picture", type=Path, help="file to draw the store's features to")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one)
        return
    lite0 = {"backbone": "tf_efficientnet_lite0", "weights": str(arguments.lite0)}
    vit = {"backbone": "vit_small_patch14_dinov2.lvd142m", "weights": str(arguments.vit)}
    if arguments.vit_pooling:
        fit = {"upsampler": "multiview", "upsampler_weights": str(arguments.vit_pooling)}
        runs = [(vit | fit, 1)]
    else:
        runs = [(backbone, repeats) for backbone in (lite0, vit) for repeats in (1, 5)]
    for options, repeats in runs:
        row = measure(arguments.images, repeats, options, arguments.picture)
        rows.append("main_job", row)
        print(json.dumps(row))


def measure(images: Path, repeats: int, chosen: dict[str, Any], picture: Path | None) -> dict[str, Any]:
    """Run the job in a separate process and monitor its memory."""
    with tempfile.TemporaryDirectory() as folder:
        link_copies(images, repeats, Path(folder) / "images")
        common = {"images": f"{folder}/images", "store": f"{folder}/store", "size": SIZE, "components": K}
        options = {**common, **chosen}
        command = [sys.executable, "-m", "benchmarks.jobs.main_job", "--one", json.dumps(options)]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak = watch(job)
        assert job.stdout is not None
        result = json.loads(job.stdout.read().splitlines()[-1])
        if picture:
            show(ShowConfig(store=options["store"], output=str(picture), weights=options["weights"]))
    return {
        "backbone": chosen["backbone"],
        "upsampler": chosen.get("upsampler", "jbu"),
        "k": K,
        "size": SIZE,
        **result,
        "peak_bytes": peak,
        **rows.measured_on(),
    }


def link_copies(images: Path, copies: int, folder: Path) -> None:
    """Make a folder of so many copies of the photographs, as links."""
    for copy in range(copies):
        (folder / str(copy)).mkdir(parents=True)
        for path in sorted(images.rglob("*.jpg")):
            (folder / str(copy) / path.name).symlink_to(path.resolve())


def watch(job: "subprocess.Popen[str]") -> int:
    """Wait for the process to end; return the peak memory of it and all its descendants."""
    peak = 0
    process = psutil.Process(job.pid)
    while job.poll() is None:
        total = 0
        try:
            for member in [process, *process.children(recursive=True)]:
                total += member.memory_full_info().pss
        except psutil.Error:
            continue
        peak = max(peak, total)
        time.sleep(POLL_S)
    return peak


def run_one(options: dict[str, Any]) -> None:
    """Run the job; the last line printed is the row."""
    import logging

    from pipeline.run.job import carry_out
    from pipeline.run.planning.plan import make_plan
    from pipeline.run.resources import GPU_SHARDS
    from schemas.options import UpsampleConfig

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    started = time.monotonic()
    plan = make_plan(UpsampleConfig(**options))
    report = carry_out(plan, started)
    row = {
        "layer": plan.configuration.backbone["layer"],
        "images": report.rows_ok + report.rows_failed,
        "failed": report.rows_failed,
        **({"shards_at_once": GPU_SHARDS} if plan.spec.device == "cuda" else {}),  # at most; memory may allow fewer
        "images_per_s": round(report.images_per_second, 2),
        "start_s": round(report.seconds - report.making_seconds, 1),
        "stage_ms_per_image": {
            stage: round(1000 * seconds / (report.rows_ok + report.rows_failed), 2)
            for stage, seconds in report.stage_seconds.items()
        },
        "store_bytes_per_image": round(sum(record.nbytes for record in report.records) / report.rows_ok),
        "explained_variance": report.explained_variance,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
