"""What fails, and when: drawn from a seed, so that a run can be repeated."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["KINDS", "SCENARIOS", "Fault", "Scenario", "draw", "shortened"]

# Kinds of faults that strike while the job runs.
KINDS = (
    "kill a worker", "kill a raylet", "switch off a node", "drain a node", "kill the driver", "stop a worker",
    "503", "stall", "hang", "lose", "outage", "join with a wrong clock",
)  # fmt: skip
_FIRST, _LAST = 0.03, 0.85  # shares of the shards that are done when the first and the last faults strike


@dataclass(frozen=True)
class Scenario:
    """A run of the job.

    Attributes:
        faults: number of faults of each kind.
        poison: images that crash the decoder.
        corrupt: whether a twentieth of the images is damaged.
        clocks_s: by how much the clocks of the first nodes are off.
        share: ``--max-failed-share``; None: the job's default, which is exceeded.
    """

    faults: Mapping[str, int]
    poison: int = 0
    corrupt: bool = False
    clocks_s: tuple[int, ...] = (0, 0, 0, 0)
    share: float | None = 0.1

    def with_faults(self, count: int) -> "Scenario":
        """The scenario with about so many faults, at least one of each kind."""
        total = sum(self.faults.values())
        return replace(self, faults={kind: max(1, round(of * count / total)) for kind, of in self.faults.items()})


@dataclass(frozen=True, order=True)
class Fault:
    """A fault that strikes once enough shards are done.

    Attributes:
        at: number of shards.
        kind: one of `KINDS`.
        pick: 0 … 1, chooses among what can be struck then.
        size: 0 … 1, how hard it strikes.
    """

    at: int
    kind: str
    pick: float
    size: float


SCENARIOS = {
    "workers": Scenario({"kill a worker": 20}),
    "nodes": Scenario({"kill a raylet": 3, "switch off a node": 3}),
    "driver": Scenario({"kill the driver": 4}),
    "stopped": Scenario({"stop a worker": 10}),
    "poison": Scenario({}, poison=4),
    "corrupt": Scenario({}, corrupt=True, share=None),
    "storage": Scenario({"503": 12, "stall": 8, "hang": 5, "lose": 14, "outage": 2}),
    "clock": Scenario({"join with a wrong clock": 1}, clocks_s=(3600, 0, 0, 0)),
    "drained": Scenario({"drain a node": 4}),
    "all": Scenario(
        {
            "kill a worker": 30, "kill a raylet": 3, "switch off a node": 3, "drain a node": 3, "kill the driver": 3,
            "stop a worker": 10, "503": 18, "stall": 8, "hang": 5, "lose": 22, "outage": 2,
            "join with a wrong clock": 1,
        },
        poison=3,
        corrupt=True,
        clocks_s=(3600, 0, 0, 0, 0),
    ),
}  # fmt: skip


def shortened(scenario: Scenario) -> Scenario:
    """The scenario with every kind of fault once."""
    faults = dict.fromkeys(scenario.faults, 1)
    return replace(scenario, faults=faults, poison=min(scenario.poison, 1), clocks_s=scenario.clocks_s[:4])


def draw(scenario: Scenario, shards: int, seed: int) -> list[Fault]:
    """Faults in the order in which they strike."""
    chance = random.Random(seed)
    kinds = [kind for kind, count in scenario.faults.items() for _ in range(count)]
    chance.shuffle(kinds)
    last = max(1, len(kinds) - 1)
    at = [round(shards * (_FIRST + (_LAST - _FIRST) * i / last)) for i in range(len(kinds))]
    return [Fault(place, kind, chance.random(), chance.random()) for place, kind in zip(at, kinds, strict=True)]
