"""Trainings that are killed, interrupted, or wait for a storage that does not answer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from densefeat import FeatureStore, StoreError, StreamingFeatures, TorchFeatures, layout
from densefeat.storage.objects import Objects
from tests.helpers.servers.s3_proxy import S3Proxy
from tests.helpers.stores import FAILED_ROWS, ROWS, make_store

GOOD_ROWS = [row for row in range(ROWS) if row not in FAILED_ROWS]
ROOT = Path(__file__).parents[3]


def training(uri: str, folder: Path, workers: int, seconds: float = 0) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.densefeat.torch.training_job", uri, str(folder), str(workers), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_training_goes_on_with_the_same_samples(tmp_path: Path, workers: int) -> None:
    known = make_store(str(tmp_path / "store"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert training(known.uri, whole, workers).wait(120) == 0
    process = training(known.uri, killed, workers, seconds=0.3)
    while not (killed / "checkpoint.pt").exists() or len((killed / "rows.txt").read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    expected = (whole / "rows.txt").read_text().splitlines()
    before = (killed / "rows.txt").read_text().splitlines()
    assert before == expected[: len(before)]
    assert len(before) < 5  # in the first epoch
    kept = torch.load(killed / "checkpoint.pt")["rows"]
    assert training(known.uri, killed, workers).wait(120) == 0
    after = (killed / "rows.txt").read_text().splitlines()[len(before) :]
    assert after == expected[kept:]
    trained = [torch.load(folder / "head.pt") for folder in (whole, killed)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.timeout(120)
def test_ctrl_c_ends_a_program_that_waits_for_the_storage(tmp_path: Path) -> None:
    known = make_store(str(tmp_path / "store"))
    FeatureStore(known.uri).index  # noqa: B018 - it is there
    shard = tmp_path / "store" / layout.shard_key(0)
    shard.unlink()
    os.mkfifo(shard)  # whoever opens it waits for a writer, as for a server that does not answer
    program = (
        "import signal, sys; from densefeat import StreamingFeatures\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run in the background
        "dataset = StreamingFeatures(sys.argv[1], 2, shuffle=False); print('reading', flush=True)\n"
        "for batch in dataset: print(batch['row'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, known.uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert out == ""
    assert time.monotonic() - start < 15


@pytest.mark.s3
@pytest.mark.timeout(300)
@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_epochs_from_s3_through_faults(s3_bucket: str, s3_proxy: S3Proxy, start_method: str) -> None:
    known = make_store(f"{s3_bucket}/store")
    dataset = StreamingFeatures(known.uri, 2, request_bytes=300, dequantize=False)
    whole = [batch["row"].tolist() for batch in dataset]  # the parent has used its connections
    loaders: list[Any] = [
        DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start_method),
        DataLoader(TorchFeatures(known.uri, dequantize=False), 2, num_workers=2, multiprocessing_context=start_method),
    ]
    requests = iter(range(10**6))
    s3_proxy.fault = lambda method, path: (
        ["503", "lose", ""][next(requests) % 3] if method == "GET" and "/features/c/" in path else ""
    )
    for loader in loaders:
        rows = []
        for batch in loader:
            rows += batch["row"].tolist()
            assert np.array_equal(batch["features"].numpy(), known.codes[batch["row"].numpy()])
        assert sorted(rows) == GOOD_ROWS
    assert [batch["row"].tolist() for batch in dataset] == whole
    assert next(requests) > 20


@pytest.mark.s3
@pytest.mark.timeout(120)
def test_a_truncated_shard_in_s3(s3_bucket: str) -> None:
    known = make_store(f"{s3_bucket}/store")
    objects = Objects(known.uri)
    objects.put(layout.shard_key(1), objects.get(layout.shard_key(1))[:-700])
    with pytest.raises(StoreError, match=r"row 7 .* is damaged: .* bytes are recorded"):
        list(StreamingFeatures(known.uri, 2))
