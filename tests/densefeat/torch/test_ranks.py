"""StreamingFeatures in several training processes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from densefeat import StreamingFeatures
from tests.densefeat.torch.epochs import FORKED, GOOD_ROWS, flat, rows_of
from tests.helpers.stores import KnownStore


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")


@FORKED
def test_ranks_of_torchrun(known8: KnownStore, torchrun: None) -> None:
    dataset = StreamingFeatures(known8.uri, 2, request_bytes=300)
    assert dataset.ranks == (1, 3)
    alone = StreamingFeatures(known8.uri, 2, request_bytes=300, rank=0, world_size=1)
    assert len(flat(dataset)) == 3
    assert sorted(flat(alone)) == GOOD_ROWS
    of_ranks = [StreamingFeatures(known8.uri, 2, request_bytes=300, rank=rank, world_size=3) for rank in range(3)]
    assert rows_of(of_ranks[1]) == rows_of(dataset)
    assert sorted(row for dataset in of_ranks for row in flat(dataset)) == GOOD_ROWS


def _of_rank(rank: int, uri: str, folder: str) -> None:
    dataset = StreamingFeatures(uri, 2, request_bytes=300)  # made before it is known which rank this is
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    rows = []
    for batch in loader:
        rows += batch["row"].tolist()
        torch.distributed.all_reduce(torch.ones(1))  # waits for the other rank in every step
    Path(folder, f"{rank}.txt").write_text(" ".join(map(str, rows)))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(300)
def test_two_processes_of_torch_distributed(known8: KnownStore, tmp_path: Path) -> None:
    processes = torch.multiprocessing.spawn(_of_rank, (known8.uri, str(tmp_path)), nprocs=2, join=False)
    while not processes.join(timeout=250):
        pass
    rows = [int(row) for rank in range(2) for row in (tmp_path / f"{rank}.txt").read_text().split()]
    assert sorted(rows) == GOOD_ROWS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
@FORKED
def test_copies_made_before_the_ranks_exist(known8: KnownStore, copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As datasets that are passed to torch.multiprocessing.spawn, or by Ray."""
    dataset = copied(StreamingFeatures(known8.uri, 2, request_bytes=300))
    assert dataset.ranks == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert dataset.ranks == copied(dataset).ranks == (rank, 2)
        seen += [row for batch in rows_of(dataset) for row in batch]
    assert sorted(seen) == sorted(dataset.rows.tolist())
    assert copied(StreamingFeatures(known8.uri, 2, rank=1, world_size=3)).ranks == (1, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
@FORKED
def test_workers_of_a_copy_see_the_new_epoch(known8: KnownStore, copied: Any) -> None:
    dataset = copied(StreamingFeatures(known8.uri, 2, request_bytes=300))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        orders.append(rows_of(loader))
    assert orders[0] != orders[1] != orders[2] != orders[0]
