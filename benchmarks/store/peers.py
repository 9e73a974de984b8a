"""The same features in other formats, and their readers: .npy and .pt files, WebDataset, HDF5, litData."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from densefeat import FeatureStore

RowReader = Callable[[int], Any]
_PER_TAR = 32


def write_peers(store: FeatureStore, rows: list[int], folder: Path) -> None:
    """Write float16 features of these rows: one file an image, tars, one HDF5 file, litData's chunks."""
    import h5py
    import webdataset
    from litdata.streaming.writer import BinaryWriter

    for name in ("npy", "pt"):
        (folder / name).mkdir(parents=True)
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    shards = webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=_PER_TAR, verbose=0)
    with h5py.File(folder / "features.h5", "w") as file, shards:
        dataset = file.create_dataset("features", (len(rows), *store.shape), "f2", chunks=(1, *store.shape))
        for i, row in enumerate(rows):
            features = store.read(row).astype(np.float16)
            np.save(folder / "npy" / f"{i}.npy", features)
            torch.save(torch.from_numpy(features), folder / "pt" / f"{i}.pt")
            shards.write({"__key__": str(i), "npy": features})
            dataset[i] = features
            writer.add_item(i, features)
    writer.done()
    writer.merge()


def random_readers(folder: Path) -> dict[str, RowReader]:
    """A reader of one image per format; thread-safe."""
    import h5py

    file = h5py.File(folder / "features.h5")["features"]
    return {
        ".npy": lambda i: np.load(folder / "npy" / f"{i}.npy"),
        ".pt": lambda i: torch.load(folder / "pt" / f"{i}.pt"),
        "HDF5": lambda i: file[i],
    }


def npy_from(get: Callable[[str], bytes]) -> RowReader:
    """A reader of .npy objects."""
    return lambda i: np.load(io.BytesIO(get(f"npy/{i}.npy")))


def epochs(folder: Path, batch_size: int) -> dict[str, Callable[[], int]]:
    """A shuffled epoch per format, with its own loader and two workers: the number of images."""
    import litdata
    import webdataset

    def web() -> int:
        urls = sorted(map(str, folder.glob("*.tar")))
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        dataset = dataset.shuffle(64).decode().to_tuple("npy").batched(batch_size)
        return sum(len(features) for (features,) in DataLoader(dataset, batch_size=None, num_workers=2))

    def lit() -> int:
        dataset = litdata.StreamingDataset(str(folder / "litdata"), shuffle=True)
        return sum(len(batch) for batch in litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=2))

    return {"WebDataset, 2 workers": web, "litData, 2 workers": lit}
