"""Claim: what reading a store costs at random and in epochs, against files per image and other formats.

    uv pip install -e '.[benchmark]'
    python -m benchmarks.store.reading --images ../shared/data/coco200/images \
        --weights ../shared/weights/tf_efficientnet_lite0.safetensors

Makes a store of photographs (224 px, k = 64, int8), and the same features in float16 in other formats, in a local
folder and in an S3 server on this machine behind 25 ms of latency. Times random images with 1, 8 and 32 in flight, and
shuffled epochs, crops and pixels; sides interleaved, medians. Raw: the bytes of the chunks, or of the shards in
requests of 8 MB, without decoding. Files are in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks import rows
from benchmarks.jobs.start import ROOT
from benchmarks.store.peers import epochs, npy_from, random_readers, write_peers
from benchmarks.store.s3 import delayed_s3
from benchmarks.timing import peak_bytes
from densefeat import FeatureStore, PixelFeatures, StreamingFeatures, layout
from densefeat.storage.objects import Objects

IN_FLIGHT, TURNS, BATCH, LATENCY_S, CROP, PIXELS = (1, 8, 32), 3, 16, 0.025, 64, 1000
REQUEST_BYTES = 8 << 20

Sides = Mapping[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--weights", required=True, help="of EfficientNet-Lite0")
    parser.add_argument("--store", help="a store made before, instead of a new one")
    parser.add_argument("--limit", type=int, default=96, help="number of images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = FeatureStore(options.store or _make_store(options, folder))
        numbers = store.rows_with_features[: options.limit].tolist()
        write_peers(store, numbers, folder / "peers")
        places = {"local": _measured(store, numbers, folder / "peers", None)}
        with delayed_s3(LATENCY_S):
            places["s3"] = _measured(_uploaded(store.uri, folder / "peers"), numbers, folder / "peers", "s3://features")
    k, height, width = store.shape
    row = {"images": len(numbers), "k": k, "height": height, "width": width, "latency_s": LATENCY_S, "places": places}
    rows.append("reading", {**row, **rows.measured_on()})
    print(json.dumps(row, indent=1))


def _make_store(options: argparse.Namespace, folder: Path) -> str:
    command = [
        *(sys.executable, "-m", "jobs.upsample_imagenet", f"--images={options.images}", f"--limit={options.limit}"),
        *("--backbone=tf_efficientnet_lite0", f"--weights={options.weights}", "--layer=-2", "--device=cpu"),
    ]
    subprocess.run([*command, f"--store={folder}/store"], cwd=ROOT, check=True)
    return f"{folder}/store"


def _uploaded(store: str, peers: Path) -> FeatureStore:
    import s3fs

    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("features")
    filesystem.put(store, "features/store", recursive=True)
    filesystem.put(str(peers / "npy"), "features/npy", recursive=True)
    return FeatureStore("s3://features/store")


def _measured(store: FeatureStore, numbers: list[int], peers: Path, bucket: str | None) -> dict[str, Any]:
    readers = _random(store, numbers, peers, bucket)
    order = np.random.default_rng(0).permutation(len(numbers)).tolist()
    random = {
        str(threads): _rates({name: _all(reader, order, threads) for name, reader in readers.items()}, len(numbers))
        for threads in IN_FLIGHT
    }
    epoch = _rates(_epochs(store, numbers, readers, peers, bucket), len(numbers))
    stream = StreamingFeatures(store, BATCH, rows=numbers, threads=8, buffer_bytes=16 << 20, request_bytes=2 << 20)
    return {"random": random, "epoch": epoch, "epoch_peak_bytes": peak_bytes(lambda: _count(stream), "cpu")}


def _random(
    store: FeatureStore, numbers: list[int], peers: Path, bucket: str | None
) -> dict[str, Callable[[int], Any]]:
    """Readers of the image of a number, the floor first."""
    readers: dict[str, Callable[[int], Any]] = {
        "raw": lambda i: store.read_chunks([numbers[i]]),
        "densefeat": lambda i: store.read(numbers[i]),
    }
    if bucket is None:
        others = random_readers(peers)
        array = zarr.open_array(f"{store.uri}/features", mode="r", zarr_format=3)
        source: dict[str, Any] = {"driver": "file", "path": f"{store.uri}/features"}
    else:
        from obstore.store import S3Store
        from zarr.storage import ObjectStore

        remote = S3Store("features", prefix="store", client_options={"allow_http": True})
        others = {".npy": npy_from(Objects(bucket).get), "obstore + decode": _obstore(remote, store, numbers)}
        array = zarr.open_array(ObjectStore(remote, read_only=True), path="features", mode="r", zarr_format=3)
        source = {"driver": "s3", "bucket": "features", "path": "store/features"}
        source |= {
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "aws_region": "us-east-1",
            "aws_credentials": {"type": "environment"},
        }
    import tensorstore

    other = tensorstore.open({"driver": "zarr3", "kvstore": source}, read=True).result()
    readers |= {"zarr-python": lambda i: array[numbers[i]], "tensorstore": lambda i: other[numbers[i]].read().result()}
    return {**readers, **others}


def _obstore(remote: Any, store: FeatureStore, numbers: list[int]) -> Callable[[int], Any]:
    import obstore

    _, offsets, sizes = store.chunk_places(np.array(numbers))

    def read(i: int) -> np.ndarray:
        key = layout.shard_key(numbers[i] // store.layout.shard_rows)
        data = obstore.get_range(remote, key, start=int(offsets[i]), length=int(sizes[i]))
        return store.decode(numbers[i], bytes(data))

    return read


def _all(reader: Callable[[int], Any], order: list[int], threads: int) -> Callable[[], None]:
    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(reader, order):
                pass

    return run


def _epochs(
    store: FeatureStore,
    numbers: list[int],
    readers: Mapping[str, Callable[[int], Any]],
    peers: Path,
    bucket: str | None,
) -> dict[str, Callable[[], Any]]:
    order = np.random.default_rng(1).permutation(len(numbers)).tolist()
    sides: dict[str, Callable[[], Any]] = {
        "raw, 8 MB": lambda: _raw(store, numbers),
        "StreamingFeatures": lambda: _count(StreamingFeatures(store, BATCH, rows=numbers, threads=8)),
        "StreamingFeatures, codes": lambda: _count(
            StreamingFeatures(store, BATCH, rows=numbers, threads=8, dequantize=False)
        ),
        "StreamingFeatures, crops": lambda: _count(
            StreamingFeatures(store, BATCH, rows=numbers, threads=8, crop=(CROP, CROP))
        ),
        "PixelFeatures": lambda: _count(PixelFeatures(store, _Mask(store), rows=numbers, pixels=PIXELS, threads=8)),
    }
    sides |= {name: _all(readers[name], order, 8) for name in readers if name.startswith(".")}
    return sides if bucket else {**sides, **epochs(peers, BATCH)}


class _Mask:
    """One class everywhere, of the size of the original."""

    def __init__(self, store: FeatureStore) -> None:
        sizes = zip(store.index["height"].to_pylist(), store.index["width"].to_pylist(), strict=True)
        self._sizes = dict(zip(store.keys, sizes, strict=True))

    def __call__(self, key: str) -> np.ndarray:
        return np.zeros(self._sizes[key], np.uint8)


def _raw(store: FeatureStore, numbers: list[int]) -> None:
    """All bytes of these rows, in requests as an epoch makes them."""
    dataset = StreamingFeatures(store, BATCH, rows=numbers, request_bytes=REQUEST_BYTES)
    runs = [
        dataset._runs.rows[a:b].tolist() for a, b in zip(dataset._runs.starts, dataset._runs.starts[1:], strict=False)
    ]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(store.read_chunks, runs):
            pass


def _count(dataset: Iterable[Any]) -> int:
    return sum(len(batch["row"]) for batch in dataset)


def _rates(sides: Sides, images: int) -> dict[str, float]:
    """Median images/s of interleaved calls, after one that is not counted."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(1 + TURNS):
        for side, function in sides.items():
            start = time.perf_counter()
            function()
            if turn:
                times[side].append(time.perf_counter() - start)
    return {side: round(images / statistics.median(seconds), 1) for side, seconds in times.items()}


if __name__ == "__main__":
    main()
