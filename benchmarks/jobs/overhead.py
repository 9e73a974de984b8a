"""Claim: a job computes nearly as fast as a bare loop over the same stages, with no store, no Ray and no recovery.

    python -m benchmarks.jobs.overhead --images PHOTOS --lite0 FILE

EfficientNet-Lite0, k = 64, 224 px, int8, on CPUs. The bare loop is one process per core, each with its share of the
images: read, decode, backbone, upsample and quantize, encode, in batches of the job's size, one after the other. It
keeps nothing. The job runs in this process (``--workers 0``) and with one worker of Ray. Start and PCA are not counted.
Interleaved runs, medians.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.jobs.main_job import SIZE, K, link_copies

BACKBONE = "tf_efficientnet_lite0"
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with photographs")
    parser.add_argument("--lite0", type=Path, help="weights of timm's tf_efficientnet_lite0")
    parser.add_argument("--copies", type=int, default=5, help="how often each photograph is used")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(SIDES[arguments.one](arguments.options))
        return
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        link_copies(arguments.images, arguments.copies, Path(folder) / "images")
        options = {
            "images": f"{folder}/images", "store": f"{folder}/store", "backbone": BACKBONE, "size": SIZE,
            "weights": str(arguments.lite0.resolve()), "components": K, "device": "cpu",
        }  # fmt: skip
        _job(options | {"workers": 0, "limit": 100})  # its basis and quantization steps are those of all runs
        images = len(list((Path(folder) / "images").rglob("*.jpg")))
        for _ in range(TURNS):
            for side, measured in rates.items():
                command = [sys.executable, "-m", "benchmarks.jobs.overhead", "--one", side]
                command += ["--options", json.dumps(options)]
                found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                measured.append(float(found.stdout.splitlines()[-1]))
                print(side, round(measured[-1], 2), file=sys.stderr)
    row = {
        "backbone": BACKBONE, "k": K, "size": SIZE, "images": images, "turns": TURNS,
        "images_per_s": {side: round(statistics.median(measured), 2) for side, measured in rates.items()},
        "all_images_per_s": {side: [round(one, 2) for one in measured] for side, measured in rates.items()},
        **rows.measured_on(),
    }  # fmt: skip
    rows.append("overhead", row)
    print(json.dumps(row))


def bare(options: dict[str, Any]) -> float:
    """Images/s of the bare loop, one process per core."""
    from pipeline.run.resources import available_cores

    paths = [str(path) for path in sorted(Path(options["images"]).rglob("*.jpg"))]
    context, cores = multiprocessing.get_context("spawn"), available_cores()
    start = context.Barrier(cores + 1)
    shares = [paths[i::cores] for i in range(cores)]
    processes = [context.Process(target=_bare_loop, args=(share, options, start)) for share in shares]
    for process in processes:
        process.start()
    start.wait()
    begun = time.monotonic()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    return len(paths) / (time.monotonic() - begun)


def _bare_loop(paths: list[str], options: dict[str, Any], start: Any) -> None:
    import torch

    from densefeat import FeatureStore, layout
    from pipeline.features.backbone import build_backbone
    from pipeline.features.pca import Basis
    from pipeline.images.decoding.decode import Geometry, decode
    from pipeline.run.feature_worker import _DEFAULT_BATCH_SIZE
    from pipeline.upsamplers.build import build_upsampler
    from pipeline.upsamplers.interface import Encoding
    from schemas.options import MAX_PIXELS, MIN_SIDE

    torch.set_num_threads(1)
    store = FeatureStore(options["store"])
    geometry = Geometry((int(SIZE), int(SIZE)), "crop", (store.layout.height, store.layout.width))
    backbone = build_backbone(BACKBONE, size=geometry.size, weights=options["weights"])
    upsampler = build_upsampler("jbu", None, backbone).with_basis(*Basis.of_store(store).tensors)
    into, batch = Encoding.of_steps(store.step, torch.device("cpu")), _DEFAULT_BATCH_SIZE["cpu"]

    def compute(some: list[str]) -> None:
        images = [decode(Path(path).read_bytes(), geometry, max_pixels=MAX_PIXELS, min_side=MIN_SIDE) for path in some]
        pixels = torch.stack([torch.from_numpy(image.pixels) for image in images])
        with torch.inference_mode():
            codes = upsampler.encode(backbone(pixels), pixels, geometry.output_size, into).values.codes.numpy()
        for one in codes:
            layout.encode_chunk(one)

    compute(paths[:batch])  # compiles
    start.wait()
    for first in range(0, len(paths), batch):
        compute(paths[first : first + batch])


def _job(options: dict[str, Any]) -> float:
    """Images/s of the job."""
    from pipeline.run.job import carry_out
    from pipeline.run.planning.plan import make_plan
    from schemas.options import UpsampleConfig

    plan = make_plan(UpsampleConfig(**options))
    return carry_out(plan, time.monotonic()).images_per_second


def _job_with(workers: int) -> Callable[[dict[str, Any]], float]:
    def run(options: dict[str, Any]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return _job(options | {"workers": workers, "pca": options["store"], "store": f"{folder}/store"})

    return run


SIDES: dict[str, Callable[[dict[str, Any]], float]] = {
    "bare loop": bare,
    "job, without Ray": _job_with(0),
    "job, one worker of Ray": _job_with(1),
}


if __name__ == "__main__":
    main()
