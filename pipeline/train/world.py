"""The group of training processes, as seen by one of them. Trivial for one process; independent of Ray."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """This process and its place in the group.

    Attributes:
        device: device that this process computes on.
        rank: 0 … size - 1; rank 0 writes.
        size: number of processes; if more than one, they form a torch process group.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes, possibly in place; every process must call it, with the same shape."""
        if self.size > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values

    def follow_lead(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with rank 0's, in place; every process must call it, with the same shapes."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """Gather the values of all processes, by rank; every process must call it."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered
