"""The processes that train together, as one of them sees them; alone, all of it is trivial. Knows nothing of Ray."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        device: it computes on.
        rank: 0 … size - 1; rank 0 writes.
        size: how many there are; more than one share a torch process group.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; each must call it, with the same shape."""
        if self.size > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values

    def follow_lead(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors those of rank 0, in place; each must call it, with the same shapes."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank; each must call it."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered
