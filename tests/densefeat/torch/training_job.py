"""A training that checkpoints after every other batch, to be killed: arguments STORE FOLDER WORKERS SECONDS.

It writes the rows of each batch to FOLDER/rows.txt, and continues from FOLDER/checkpoint.pt if that is there.
"""

import sys
import time
import warnings
from pathlib import Path

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from densefeat import StreamingFeatures

EPOCHS = 2


def main() -> None:
    uri, folder, workers, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = StreamingFeatures(uri, 2, request_bytes=300, buffer_bytes=2000)
    loader = StatefulDataLoader(dataset, batch_size=None, num_workers=workers)
    head = torch.nn.Linear(dataset.store.shape[0], 3)
    optimizer = torch.optim.Adam(head.parameters())
    first = 0
    if (folder / "checkpoint.pt").exists():
        checkpoint = torch.load(folder / "checkpoint.pt")
        first = checkpoint["epoch"]
        head.load_state_dict(checkpoint["head"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loader.load_state_dict(checkpoint["loader"])
    steps = 0
    for epoch in range(first, EPOCHS):
        dataset.set_epoch(epoch)
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(head(batch["features"].mean((2, 3))), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with (folder / "rows.txt").open("a") as file:
                file.write(f"{epoch} {batch['row'].tolist()}\n")
            steps += 1
            if steps % 2 == 0:
                checkpoint = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint |= {"epoch": epoch, "loader": loader.state_dict(), "rows": lines(folder)}
                torch.save(checkpoint, folder / "partial.pt")
                (folder / "partial.pt").rename(folder / "checkpoint.pt")
            time.sleep(seconds)
    torch.save(head.state_dict(), folder / "head.pt")


def lines(folder: Path) -> int:
    return len((folder / "rows.txt").read_text().splitlines())


if __name__ == "__main__":
    main()
